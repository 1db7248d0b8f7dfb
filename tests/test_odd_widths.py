"""Matrices whose sides are odd: two 4-bit values share a byte, and a row may end within one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import toolkit
from tests.gptq_oracle import correlated_input, heavy_tailed_weight
from toolkit.quant.blockwise import QuantSpec, dequantize_blocks, quantize_blocks
from toolkit.quant.gptq import factorize

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 257,
    "eos_token_id": 1,
}


@pytest.mark.parametrize("target", ["qnn", "openvino", "vitisai", "dml", "cpu"])
@pytest.mark.parametrize("change", ["", "profile=lpbq", "profile=row-scales"])
def test_an_odd_mlp_computes_as_its_checkpoint(target: str, change: str, tmp_path: Path) -> None:
    """By the distance from the reference: a nibble at the wrong place is as far off as no model at all."""
    if change and target != "qnn":
        return
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    changes = ["quantize=[{match: '*', bits: 4, block_size: 32}]", *([change] if change else [])]
    plans = toolkit.plan(target, checkpoint=tmp_path, out=tmp_path / "b", synthetic=True, changes=changes)
    (bundle,) = toolkit.export(plans, compile=False)
    effort = toolkit.Effort(tokens=128, tasks=False, speed=False, baseline=False, simulate=False)
    report = toolkit.validate(bundle, plans[0].opened, effort)
    assert report.parity is not None and report.parity.mean_kld < 1e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_of_an_odd_number_is_rounded_as_an_even_one(bits: int) -> None:
    """The value beyond the end changes nothing: the same row with a zero at its end is rounded alike."""
    weight = heavy_tailed_weight(101)
    even = np.pad(weight, ((0, 0), (0, 1)))
    spec = QuantSpec(bits, 102, True, "kquant", signed=True)
    ones = np.ones(102, np.float32)
    odd_blocks, even_blocks = (quantize_blocks(w, spec, ones[: w.shape[1]]) for w in (weight, even))
    odd_rows, even_rows = dequantize_blocks(odd_blocks, spec, 101), dequantize_blocks(even_blocks, spec, 102)
    assert np.allclose(odd_rows, even_rows[:, :101], rtol=1e-4)
    moment = (x := correlated_input(101)).T @ x / len(x)
    solved = dequantize_blocks(factorize(moment.astype(np.float32), 101).solved(weight, spec).blocks, spec, 101)
    plain = dequantize_blocks(odd_blocks, spec, 101)
    assert np.square(x @ (solved - weight).T).sum() < np.square(x @ (plain - weight).T).sum()
