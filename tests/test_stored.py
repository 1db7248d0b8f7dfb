"""Weights read back from data files against ORT's kernels, which read the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.graphs import recipe_for, write_graphs
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.checkpoint.padded_heads import pad_heads
from toolkit.evaluate.positions import open_positions
from toolkit.graph.attention import HEAD_DIM_MULTIPLE
from toolkit.partition.stored import StoredTensors
from toolkit.recipe import QuantRule
from toolkit.reference.decoder import reference_logits

RULES = {
    "asymmetric": (QuantRule("*", "rtn", 4, 64),),
    "symmetric": (QuantRule("*", "rtn", 4, 32, symmetric=True),),
    # Attention's three matrices apart, since their formats differ.
    "mixed": (QuantRule("*v_proj", "rtn", 8, 32), QuantRule("*", "rtn", 4, 32)),
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(("model", "target"), [("tiny_r1", "cpu"), ("stories260k", "cpu"), ("tiny_r1", "dml")])
def test_a_forward_of_the_stored_weights_is_the_bundles(
    model: str, target: str, rules: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """stories260k: 172 columns, whose last block is padded, and a tied head."""
    folder: Path = request.getfixturevalue(model)
    layout = write_graphs(folder, tmp_path, target, recipe_for(target, RULES[rules]))
    config = pad_heads(open_checkpoint(folder), HEAD_DIM_MULTIPLE).config
    ids = [int(i) for i in np.random.default_rng(0).integers(3, config.vocab_size, 30)]
    (expected,) = reference_logits(config, StoredTensors(layout, tmp_path), [ids])
    made = open_positions(tmp_path, exact=True).logits(ids)
    # dml computes in float16.
    assert np.sqrt(((made - expected) ** 2).mean()) < (0.02 if target == "dml" else 1e-4) * expected.std()


def test_rows_are_those_of_the_whole(stories260k: Path, tmp_path: Path) -> None:
    stored = StoredTensors(write_graphs(stories260k, tmp_path, "cpu", recipe_for("cpu", RULES["mixed"])), tmp_path)
    source = pad_heads(open_checkpoint(stories260k), HEAD_DIM_MULTIPLE).source
    assert sorted(stored.names()) == sorted(name for name in source.names() if name != "lm_head.weight")
    for name in stored.names():
        whole, exact = stored.read(name), source.read(name)
        assert whole.shape == exact.shape and np.abs(whole - exact).max() < 0.2 * np.abs(exact).max()
        np.testing.assert_array_equal(stored.read_rows(name, 3, 8), whole[3:8])
