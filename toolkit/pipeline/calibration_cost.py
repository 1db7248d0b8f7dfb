"""What calibrating will take, known from shapes alone: tokens, operations, memory, disk; and time on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import numpy as np

from toolkit.calibrate.solve import TOKENS_PER_CHANNEL
from toolkit.checkpoint.anatomy import LinearInput, describe
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.weights import expected_tensors
from toolkit.names import weight
from toolkit.pipeline.text import LONGEST
from toolkit.quality import QUALITIES
from toolkit.quant.formats import planned_specs
from toolkit.recipe import Recipe
from toolkit.target import Form

# Attention, norms, rounding and the disk take time that products do not: measured, see LOG.md.
_OVERHEAD: Final = 1.5
_SCALES_PER_INPUT: Final = 60
_SAMPLE: Final = 256
# What the ranges of activations are taken from where nothing else needs text.
_RANGE_TOKENS: Final = 1024


@dataclass(frozen=True)
class CalibrationCost:
    """A forecast; `operations` are floating-point ones of matrix products."""

    tokens: int
    operations: float
    memory_bytes: int
    disk_bytes: int

    def seconds(self) -> float:
        """On this machine, by the speed of a product now."""
        return _OVERHEAD * self.operations / operations_per_s()


def calibration_tokens(recipe: Recipe, config: ModelConfig, form: Form) -> int:
    """How much text the recipe's quality reads: for GPTQ enough for its widest input. Ranges alone need less."""
    if recipe.calibration_tokens:
        return recipe.calibration_tokens
    if not recipe.calibrated:
        return _RANGE_TOKENS
    tokens = QUALITIES[recipe.quality].tokens or QUALITIES["balanced"].tokens
    solved = _solved(recipe, config, form)
    return max([tokens, *(TOKENS_PER_CHANNEL * given.width + LONGEST for given in solved)])


def calibration_cost(recipe: Recipe, config: ModelConfig, form: Form) -> CalibrationCost | None:
    """Of `calibrate` for a recipe; None where nothing is read."""
    if not (recipe.calibrated or form.qdq):
        return None
    shapes, tokens = expected_tensors(config), calibration_tokens(recipe, config, form)
    inputs, head = describe(config).inputs, describe(config).head_input
    layers = [given for given in inputs if given is not head and given.name != head.name]
    rows = {given.name: sum(shapes[weight(reader)][0] for reader in given.readers) for given in inputs}
    weights = sum(rows[given.name] * given.width for given in layers)
    passes = recipe.calibrated + form.qdq
    operations = 2.0 * weights * tokens * passes
    if recipe.calibrated and recipe.fold:
        operations += sum(
            2.0 * _SCALES_PER_INPUT * _SAMPLE * 2 * _SAMPLE * len(given.readers) * given.width for given in layers
        )
    if recipe.bits_per_weight:
        # Probes: as much again through the layers, and two tokens in all for each of the text's through the head.
        operations += 2.0 * weights * tokens + 4.0 * tokens * config.vocab_size * config.hidden_size
    solved = _solved(recipe, config, form)
    if solved:
        operations += 2.0 * 2 * weights * tokens * 1.6
        operations += sum(_solving(rows[given.name], given.width, tokens) for given in solved)
    layer_bytes = 4 * weights // config.num_hidden_layers
    widest = max((given.width for given in solved), default=0)
    wide = 4 * LONGEST * config.intermediate_size * 4
    streams = 4 * tokens * config.hidden_size
    spills = 4 * tokens * (config.q_size + config.hidden_size + config.intermediate_size)
    return CalibrationCost(
        tokens=tokens,
        operations=operations,
        memory_bytes=int(_layers_held(recipe, bool(solved)) * layer_bytes) + 18 * widest**2 + wide,
        disk_bytes=2 * streams + (2 * (streams + spills) if solved else 0),
    )


def _layers_held(recipe: Recipe, solves: bool) -> float:
    """Layers' worth of float32 weights: the exact one and half of one on its way in; with probes or GPTQ a rounded one
    and what it is made of."""
    if solves:
        return 3.0
    return 2.5 if recipe.bits_per_weight else 1.5


def operations_per_s() -> float:
    """Of a float32 product of numpy's, the best of a few."""
    side, best = 1024, float("inf")
    a = np.ones((side, side), np.float32)
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2.0 * side**3 / best


def _solved(recipe: Recipe, config: ModelConfig, form: Form) -> list[LinearInput]:
    """Inputs that a matrix reads which is to be solved."""
    specs = planned_specs(config, recipe, form)
    return [
        given for given in describe(config).inputs if any(specs[weight(r)].rounded_by.solves for r in given.readers)
    ]


def _solving(rows: int, width: int, tokens: int) -> float:
    """Both products, the factor, the corrected target and the updates (quant/gptq.py, calibrate/solve.py)."""
    few = rows < width
    products = 1.0 * tokens * width**2 + (4.0 * tokens * rows * width if few else 2.0 * tokens * width**2)
    return products + 1.4 * width**3 + (5.0 if few else 7.0) * rows * width**2
