"""The experts of a model under calibration: how a text's tokens came to each, and their weights as they are rounded."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.calibrate.expert_tokens import ExpertTokens
from toolkit.calibrate.facts import InputFacts
from toolkit.calibrate.statistics import InputStatistics
from toolkit.checkpoint.sublayers import Moe
from toolkit.checkpoint.weights import Tensors
from toolkit.device.arrays import Device
from toolkit.quant.awq import FoldChoice
from toolkit.quant.blockwise import QuantSpec, dequantize_blocks, quantize_blocks
from toolkit.reference.decoder import Layer, LayerTensors

Floats = NDArray[np.float32]

# Second moments of fewer tokens are off by a quarter or more, and those of none are nothing.
FEWEST_ROUTED: Final = 32


def expert_tokens(inputs: Mapping[str, InputFacts]) -> ExpertTokens | None:
    """How the text's tokens were spread over the experts; None for a model without any."""
    counts = {name: facts.tokens for name, facts in inputs.items() if facts.tokens is not None}
    if not counts:
        return None
    # What a linear of an expert reads first stands for it: as many tokens come to the others.
    each = [count for name, count in counts.items() if names.role_of(name) == "gate_proj"]
    few = sum(count < FEWEST_ROUTED for count in each)
    return ExpertTokens(len(each), min(each), int(statistics.median(each)), max(each), FEWEST_ROUTED, few)


def routed_facts(seen: InputStatistics) -> InputFacts:
    """Returns what an expert's input looks like by the tokens that came there; too few say nothing of its channels."""
    sample = seen.sample()
    moments = sample.moments if seen.seen >= FEWEST_ROUTED else np.zeros_like(sample.moments)
    return InputFacts(moments, sample.values(), FoldChoice(), {}, seen.seen)


def with_rounded_experts(
    exact: Layer, source: Tensors, specs: Mapping[str, QuantSpec], importance: Mapping[str, Floats]
) -> dict[str, Floats]:
    """A copy of a layer's tensors by name, with experts as the streaming pass will round them if it has any."""
    if not isinstance(exact.anatomy.mlp, Moe):
        return dict(exact.tensors)
    tensors = _RoundedExperts(source, exact.on, specs, importance)
    tensors.update(exact.tensors)
    return tensors


class _RoundedExperts(LayerTensors):
    """A layer's tensors, of which those of its experts come as the streaming pass will round them."""

    def __init__(
        self, source: Tensors, on: Device, specs: Mapping[str, QuantSpec], importance: Mapping[str, Floats]
    ) -> None:
        super().__init__(source, on, ())
        self._specs, self._importance = specs, importance

    def __missing__(self, name: str) -> Floats:
        spec, weight = self._specs[name], self._source.read(name)
        blocks = quantize_blocks(weight, spec, self._importance.get(name))
        return self._on.from_host(dequantize_blocks(blocks, spec, weight.shape[1]))
