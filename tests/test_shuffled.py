"""A checkpoint with its channels in another order computes the same, and stands on no grid of blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import shuffled
from benchmarks.dequantized import dequantized_folder
from benchmarks.shuffled import shuffled_orders
from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.errors import UnsupportedError
from toolkit.reference.decoder import reference_logits

TOKENS = [[7, 300, 12, 45, 9, 101, 33, 250, 8, 19]]


def logits(checkpoint: Checkpoint) -> np.ndarray:
    return reference_logits(checkpoint.config, checkpoint.source, TOKENS)[0]


@pytest.mark.parametrize("model", ["tiny_r1", "stories260k"])
def test_the_function_stays(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """tiny-r1 has biases and shares kv heads, stories260k a tied head."""
    source = request.getfixturevalue(model)
    plain = dequantized_folder(source, tmp_path / "plain")
    mixed = dequantized_folder(source, tmp_path / "mixed", shuffled=True)
    assert plain.config == mixed.config
    one, other = logits(plain), logits(mixed)
    assert np.abs(one - other).max() < 1e-4 * one.std()
    moved = shuffled_orders(decoder_of(plain.config))
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"):
        a, b = plain.source.read(name), mixed.source.read(name)
        assert not np.array_equal(a, b) and np.array_equal(np.sort(a.ravel()), np.sort(b.ravel())) and name in moved


def test_a_block_is_of_many_blocks(tiny_r1: Path) -> None:
    orders = shuffled_orders(decoder_of(open_checkpoint(tiny_r1).config))
    for name in ("gate_proj", "down_proj", "q_proj"):
        half = "mlp" if name in ("gate_proj", "down_proj") else "self_attn"
        columns = orders[f"model.layers.0.{half}.{name}.weight"].columns
        assert columns is not None
        assert len({int(k) // 32 for k in columns[:32]}) > 2


def test_heads_values_move_with_the_columns_that_read_them(
    tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plausible mistake: every query head's columns in one order where its kv head has its own."""
    monkeypatch.setattr(shuffled.np, "repeat", lambda within, count, axis: np.tile(within, (count, 1)))
    plain = dequantized_folder(tiny_r1, tmp_path / "plain")
    wrong = dequantized_folder(tiny_r1, tmp_path / "wrong", shuffled=True)
    assert np.abs(logits(plain) - logits(wrong)).max() > 0.1 * logits(plain).std()


def test_norms_over_heads_are_refused(tiny_r1: Path) -> None:
    config = open_checkpoint(tiny_r1).config
    with pytest.raises(UnsupportedError, match="without norms over heads"):
        shuffled_orders(decoder_of(replace(config, structure=replace(config.structure, qk_norm=True))))
