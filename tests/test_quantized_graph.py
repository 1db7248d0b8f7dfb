"""A quantized graph against the reference on its own dequantized weights: graph errors apart from rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.test_families import CASES, make_checkpoint
from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.weights import open_weights
from toolkit.graph.decoder import build_decoder, save_graph
from toolkit.graph.layout import plan_layout
from toolkit.partition.pack import pack_weights
from toolkit.quant.blockwise import QuantSpec
from toolkit.recipe import QuantRule, Recipe
from toolkit.reference.decoder import reference_logits
from toolkit.validate.rounded import RoundedTensors
from toolkit.validate.session import AllPositions


def _exact_activations(path: Path) -> None:
    """accuracy_level 4 rounds activations to int8; level 1 does not."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(model, path)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("case", ["qwen2", "qwen2-tied", "llama-bias", "mistral-sliding", "qwen3"])
@pytest.mark.parametrize("v_bits", [4, 8])
def test_quantized_graph_computes_its_dequantized_weights(
    case: str, symmetric: bool, v_bits: int, tmp_path: Path
) -> None:
    make_checkpoint(*CASES[case], tmp_path)
    config = read_config(tmp_path)
    source = open_weights(tmp_path, config)
    rules = (QuantRule("*.v_proj", bits=v_bits, symmetric=symmetric), QuantRule("*", symmetric=symmetric))
    recipe = Recipe("r", "m", "cpu", 64, rules, {})
    layout = plan_layout(config, recipe)
    packed = "model.layers.0.self_attn.qkv_proj.weight" in layout.units
    assert packed == (v_bits == 4 and not config.qk_norm)
    pack_weights(source, layout, tmp_path / "model.onnx.data", tmp_path / "journal")
    save_graph(build_decoder(config, layout, "model.onnx.data", 64), tmp_path / "model.onnx")
    _exact_activations(tmp_path / "model.onnx")
    ids = list(range(5, 45))

    def spec_of(tensor: str) -> QuantSpec:
        rule = recipe.rule_for(tensor.removesuffix(".weight"))
        return QuantSpec(rule.bits, rule.block_size, rule.symmetric)

    (expected,) = reference_logits(config, RoundedTensors(source, spec_of), [ids])
    assert np.abs(AllPositions(tmp_path).logits(ids) - expected).max() <= 1e-3
