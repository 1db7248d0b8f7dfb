"""Quantized graphs against the reference on their own dequantized weights: graph errors apart from rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.graphs import WINDOW, recipe_for, write_graphs
from tests.random_models import CASES, make_checkpoint
from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.weights import Tensors, open_weights
from toolkit.evaluate.positions import open_positions
from toolkit.evaluate.rounded import RoundedTensors
from toolkit.quant.blockwise import QuantSpec
from toolkit.recipe import QuantRule, Recipe
from toolkit.reference.decoder import reference_logits
from toolkit.target import CPU_EP, TARGETS


def _short(target: str) -> tuple[bool, bool]:
    """Whether scales are short, of the embedding and the head, and of all else."""
    row = TARGETS[target]
    on_cpu = row.accelerator.execution_provider == CPU_EP
    return on_cpu or row.form.short_outside, on_cpu


def _rounded(source: Tensors, recipe: Recipe) -> RoundedTensors:
    outside, inside = _short(recipe.target)

    def spec_of(tensor: str) -> QuantSpec:
        rule = recipe.rule_for(tensor.removesuffix(".weight"))
        short = outside if tensor in ("model.embed_tokens.weight", "lm_head.weight") else inside
        assert isinstance(rule.block_size, int)
        # What the algorithm `auto` is without data.
        return QuantSpec(rule.bits, rule.block_size, rule.symmetric, "kquant", short_scales=short)

    return RoundedTensors(source, spec_of)


@pytest.mark.parametrize("case", ["qwen2", "qwen2-tied", "llama-bias", "mistral-sliding", "qwen3", "smollm3"])
@pytest.mark.parametrize(
    ("symmetric", "wide"), [(True, "*.v_proj"), (False, ""), (False, "*.v_proj"), (False, "*.k_proj|*.v_proj")]
)
def test_quantized_graphs_compute_their_dequantized_weights(
    case: str, symmetric: bool, wide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(*CASES[case], tmp_path)
    config = read_config(tmp_path)
    source = open_weights(tmp_path, config)
    rules = (QuantRule(wide, bits=8, symmetric=symmetric), QuantRule("*", symmetric=symmetric))
    ids = list(range(5, 45))
    # By what a target rounds to, which several have in common.
    logits: dict[tuple[bool, bool], NDArray[np.float32]] = {}
    for target, row in TARGETS.items():
        if any(config.structure.sliding_windows) and not row.form.local_window:
            continue
        # In float32, since half precision alone is an error of a hundredth.
        monkeypatch.setitem(TARGETS, target, replace(row, form=replace(row.form, activations="float32")))
        if _short(target) not in logits:
            (logits[_short(target)],) = reference_logits(config, _rounded(source, recipe_for(target, rules)), [ids])
        expected = logits[_short(target)]
        layout = write_graphs(tmp_path, tmp_path / target, target, recipe_for(target, rules))
        joined = {name for name in ("qkv_proj", "kv_proj") if f"model.layers.0.self_attn.{name}.weight" in layout.units}
        all_three = not wide and not config.structure.qk_norm and row.form.packed_qkv
        two = row.form.packed_kv and wide != "*.v_proj"
        assert joined == ({"qkv_proj"} if all_three else {"kv_proj"} if two else set())
        bundle = open_positions(tmp_path / target, exact=True)
        assert np.abs(bundle.logits(ids) - expected).max() <= 1e-3
        # Single steps over a window: test_families.py goes further.
        for prompt in (1, 2 * WINDOW + 3):
            length = prompt + WINDOW + 1
            assert np.abs(bundle.logits(ids[:length], prompt) - expected[:length]).max() <= 1e-3


@pytest.mark.parametrize("target", [name for name, row in TARGETS.items() if row.form.activations == "float16"])
def test_half_precision_costs_no_more_than_half_precision(target: str, tmp_path: Path) -> None:
    """The float16 graphs, computed by ORT's CPU kernels, within a hundredth of the logits' size."""
    make_checkpoint(*CASES["qwen2"], tmp_path)
    config, ids = read_config(tmp_path), list(range(5, 45))
    recipe = recipe_for(target)
    write_graphs(tmp_path, tmp_path / target, target, recipe)
    (expected,) = reference_logits(config, _rounded(open_weights(tmp_path, config), recipe), [ids])
    logits = open_positions(tmp_path / target, exact=True).logits(ids, 2 * WINDOW + 3)
    assert 1e-4 < np.abs(logits - expected).max() / np.abs(expected).max() <= 1e-2
