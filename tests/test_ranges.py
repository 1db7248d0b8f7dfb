"""Activation ranges against what transformers computes on the way, and what a bad checkpoint shows in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from tests.sources import Changed
from toolkit import names
from toolkit.calibrate import ranges as ranging
from toolkit.calibrate.ranges import activation_ranges
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.errors import NonFiniteError, UnsupportedError

Floats = NDArray[np.float32]
SEQUENCES = [[int(i) for i in np.random.default_rng(k).integers(3, 1000, 20 + k)] for k in range(3)]


@pytest.fixture(scope="module")
def seen(tiny_r1: Path) -> dict[str, Floats]:
    """By point, its values [T, K] on all sequences, from forward hooks of transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_r1, dtype=torch.float32).eval()
    kept: dict[str, list[Floats]] = {}

    def keep(point: str, value: torch.Tensor) -> None:
        kept.setdefault(point, []).append(value.detach().reshape(-1, value.shape[-1]).numpy().copy())

    def watch(name: str, module: torch.nn.Module) -> None:
        def hook(_: Any, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
            if isinstance(module, torch.nn.Linear):
                keep(names.input_of(name), given[0])
                made = made if module.bias is None else made - module.bias
            keep(names.output_of(name), made)

        module.register_forward_hook(hook)

    for name, module in model.named_modules():
        if name.startswith("model.layers.") and (isinstance(module, torch.nn.Linear) or name.endswith("act_fn")):
            # The activation function is one object for all layers.
            watch(name, module)
    with torch.no_grad():
        for ids in SEQUENCES:
            model(torch.tensor([ids]))
    return {point: np.concatenate(pieces) for point, pieces in kept.items()}


@pytest.mark.parametrize("percentile", [100, 90])
def test_ranges_are_those_of_transformers(
    percentile: float, seen: dict[str, Floats], tiny_r1: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    found = activation_ranges(checkpoint.config, checkpoint.source, SEQUENCES, percentile, tmp_path)
    # Per layer: inputs of qkv, o, gate and up, down; outputs of seven linears; the activation function.
    assert len(found) == 12 * checkpoint.config.num_hidden_layers
    for point, values in found.items():
        expected = seen[point]
        low = min(0.0, float(np.percentile(expected.min(axis=1), 100 - percentile)))
        high = max(0.0, float(np.percentile(expected.max(axis=1), percentile)))
        assert (values.low, values.high) == pytest.approx((low, high), abs=3e-4 * float(np.abs(expected).max()))


def test_an_interrupted_pass_goes_on_after_the_last_whole_layer(
    tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    whole = activation_ranges(checkpoint.config, checkpoint.source, SEQUENCES, 100, tmp_path / "whole")

    def stop(what: str) -> None:
        if what == "ranges of layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        activation_ranges(checkpoint.config, checkpoint.source, SEQUENCES, 100, tmp_path / "cut", stop)
    passed: list[int] = []
    watched = ranging._WatchedLayer

    class Counted(watched):  # type: ignore[misc, valid-type]
        def __init__(self, *given: Any) -> None:
            passed.append(given[-1].anatomy.index)
            super().__init__(*given)

    monkeypatch.setattr(ranging, "_WatchedLayer", Counted)
    again = activation_ranges(checkpoint.config, checkpoint.source, SEQUENCES, 100, tmp_path / "cut")
    assert again == whole and passed == [2, 3]


def test_nan_is_named_where_it_comes_up(tiny_r1: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    name = "model.layers.2.mlp.up_proj.weight"
    weight = checkpoint.source.read(name).copy()
    weight[5] = np.nan
    source = Changed(checkpoint.source, {name: weight})
    with pytest.raises(NonFiniteError, match=r"model\.layers\.2\.mlp\.up_proj\.output is NaN or infinite"):
        activation_ranges(checkpoint.config, source, SEQUENCES, 100, tmp_path)


@pytest.mark.parametrize(
    ("tensor", "factor", "words"),
    [
        ("model.layers.1.self_attn.q_proj.weight", 1e6, "attention scores of layer 1 reach"),
        ("model.layers.1.mlp.down_proj.weight", 1e6, "hidden states of layer 1 reach"),
    ],
)
def test_what_float16_cannot_hold_is_refused(
    tensor: str, factor: float, words: str, tiny_r1: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    source = Changed(checkpoint.source, {tensor: checkpoint.source.read(tensor) * np.float32(factor)})
    with pytest.raises(UnsupportedError, match=words + r".*float16 holds 65504: export for a target .* such as cpu"):
        activation_ranges(checkpoint.config, source, SEQUENCES, 100, tmp_path)
