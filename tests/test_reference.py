"""The reference's own shortcuts against itself without them: sequences together, queries some at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.random_models import CASES, make_checkpoint
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.reference import attention
from toolkit.reference.attention import attend
from toolkit.reference.decoder import batched, embed, read_layer, reference_hidden, through_layer

Floats = NDArray[np.float32]


def test_short_sequences_are_batched_and_long_ones_stand_alone() -> None:
    assert batched([250, 250, 12, 1, 3000, 5, 6]) == [(250, 250, 12), (1,), (3000,), (5, 6)]
    assert batched([]) == []


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "mistral-sliding"])
def test_sequences_together_are_each_alone(case: str, tmp_path: Path) -> None:
    family, extra = CASES[case]
    make_checkpoint(family, extra, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    layer = read_layer(checkpoint.config, checkpoint.source, 1)
    pieces = [embed(checkpoint.source, list(range(3, 3 + length))) for length in (40, 1, 17)]
    together = through_layer(layer, pieces)
    for alone, found in zip((layer(x) for x in pieces), together, strict=True):
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize("seen", [0, 23])
def test_attention_is_the_same_however_many_queries_are_taken_at_once(
    window: int | None, seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    q, k, v = (
        rng.standard_normal((n, heads, 16)).astype(np.float32) for n, heads in ((50, 6), (50 + seen, 2), (50 + seen, 2))
    )
    positions = np.arange(seen, 50 + seen)
    expected = _attention(q, k, v, positions, window)
    for queries in (1, 8, 128):
        monkeypatch.setattr(attention, "_QUERIES", queries)
        np.testing.assert_allclose(attend(q, k, v, positions, window, 1 / 4), expected, atol=1e-5)


def _attention(
    q: Floats, k: Floats, v: Floats, positions: NDArray[np.int64], window: int | None
) -> NDArray[np.float64]:
    """By the formula in float64, a head and a query at a time."""
    mixed = np.zeros((q.shape[0], q.shape[1] * q.shape[2]))
    for t, position in enumerate(positions):
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(q.shape[1]):
            own = head * k.shape[1] // q.shape[1]
            scores = k[first : position + 1, own].astype(np.float64) @ q[t, head] / 4.0
            shares = np.exp(scores - scores.max())
            mixed[t, head * 16 : head * 16 + 16] = shares / shares.sum() @ v[first : position + 1, own]
    return mixed


def test_a_forward_pass_of_many_sequences_is_that_of_each(tiny_r1: Path) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    sequences = [list(range(40, 40 + length)) for length in (30, 12, 5)]
    together = reference_hidden(checkpoint.config, checkpoint.source, sequences)
    for ids, found in zip(sequences, together, strict=True):
        (alone,) = reference_hidden(checkpoint.config, checkpoint.source, [ids])
        np.testing.assert_allclose(found, alone, atol=1e-4 * np.abs(alone).max())
