"""What calibrating will take, known from shapes alone: tokens, work, memory, disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.linears import LinearInput
from toolkit.checkpoint.weights import parameter_count
from toolkit.machine import free_memory_bytes
from toolkit.names import layer_of, weight
from toolkit.pipeline.calibration_work import (
    held_weights,
    input_weights,
    ranges_work,
    solving_work,
    survey_work,
    tuning_work,
)
from toolkit.pipeline.text import LONGEST
from toolkit.pipeline.work import Work
from toolkit.quality import QUALITIES
from toolkit.quant.formats import planned_specs
from toolkit.quant.gptq_tokens import pays, tokens_taken
from toolkit.recipe import Recipe
from toolkit.reference.decoder import head_step, rows_together
from toolkit.target import Form

# What the ranges of activations are taken from where nothing else needs text.
_RANGE_TOKENS: Final = 1024
# Of a matrix' rows in float32 while they are solved: these, their target, what is left of them, what they are restored
# to, and those of the rows before. 7.3 were measured of a head with a vocabulary of 151,936 and 2,048 channels.
_COPIES: Final = 8


@dataclass(frozen=True)
class CalibrationCost:
    """What reading a recipe's text takes: `tokens` of it, and `work`, `memory_bytes` and `disk_bytes` foreseen."""

    tokens: int
    work: Work
    memory_bytes: int
    disk_bytes: int


def calibration_tokens(recipe: Recipe, config: ModelConfig) -> int:
    """How much text the recipe reads, or its quality for such a model if it does not say. Ranges alone need less."""
    if recipe.calibration_tokens:
        return recipe.calibration_tokens
    if not recipe.calibrated:
        return _RANGE_TOKENS
    return QUALITIES[recipe.quality].tokens_for(parameter_count(config)) or QUALITIES["balanced"].tokens


def wide_tokens(recipe: Recipe) -> int:
    """How many tokens at most GPTQ takes of a wide input, as its quality says; 0, which is all, of a text whose length
    the recipe says."""
    return 0 if recipe.calibration_tokens else QUALITIES[recipe.quality].wide_tokens


def remembers(recipe: Recipe, config: ModelConfig, form: Form) -> bool:
    """Whether the weights stay in memory between the survey, which a budget waits for, and the solver: so they are read
    once for both, where they fit twice into what is free."""
    both = recipe.calibrated and recipe.bits_per_weight > 0 and bool(_solved(recipe, config, form))
    return both and 8 * parameter_count(config) < free_memory_bytes()


def solves_in_step(recipe: Recipe, config: ModelConfig, form: Form) -> bool:
    """Whether each layer is solved as soon as it is surveyed: what is solved stands beforehand then, without a budget,
    and so does the embedding, which every layer behind it reads, unless it is searched by what arrives at the head. One
    that is solved last, as the head, is searched without text for the layers (`calibrate/solve.py`)."""
    specs, tensor = planned_specs(config, recipe, form), decoder_of(config).embedding.weight
    rounded_by = specs[tensor].rounded_by
    waits = config.tie_word_embeddings and rounded_by.reads_text and not rounded_by.solves
    return bool(_solved(recipe, config, form)) and not recipe.bits_per_weight and not waits


def calibration_cost(recipe: Recipe, config: ModelConfig, form: Form) -> CalibrationCost | None:
    """What calibrating takes for a recipe, the ranges of its activations included; None where nothing is read."""
    if not (recipe.calibrated or form.qdq):
        return None
    tokens, solved = calibration_tokens(recipe, config), _solved(recipe, config, form)
    work = ranges_work(config, tokens) if form.qdq else Work()
    if recipe.calibrated:
        specs = planned_specs(config, recipe, form)
        work += survey_work(config, specs, tokens, recipe.fold, recipe.bits_per_weight > 0)
    if solved:
        streams, revisits = 1 if solves_in_step(recipe, config, form) else 2, QUALITIES[recipe.quality].revisits
        work += solving_work(config, solved, tokens, streams, revisits, wide_tokens(recipe))
    tuned = _tuned_bytes(config) if recipe.tuning_steps else 0
    if recipe.tuning_steps:
        work += tuning_work(config, tokens, recipe.tuning_steps)
    kept = 4 * parameter_count(config) if remembers(recipe, config, form) else 0
    wide = 4 * LONGEST * config.intermediate_size * 4
    streams = 4 * tokens * config.hidden_size
    spills = 4 * tokens * (config.q_size + config.hidden_size + config.intermediate_size)
    return CalibrationCost(
        tokens=tokens,
        work=work,
        memory_bytes=max(tuned, _layers_bytes(recipe, config, form, tokens) + wide, _head_bytes(config, solved)) + kept,
        # The survey's stream and the rounded one before and behind a layer, and in its middle; twice what linears read.
        disk_bytes=5 * streams + 2 * spills if solved else 2 * streams,
    )


def _tuned_bytes(config: ModelConfig) -> int:
    """Returns what tuning holds: of every weight its integer, its value, its gradient and what that is made of, twice
    the head's, and what a passage leaves in each layer for the way back."""
    weights = parameter_count(config)
    a_token = 12 * config.hidden_size + 8 * config.intermediate_size + 3 * config.num_attention_heads * LONGEST
    head = 4 * config.vocab_size * config.hidden_size
    return 14 * weights + 2 * head + 4 * LONGEST * a_token * config.num_hidden_layers


def _head_bytes(config: ModelConfig, solved: Sequence[LinearInput]) -> int:
    """Returns what solving the head takes: its second moment, and some rows of it in all the states they go through.
    Where layers are thin, as those whose experts come one at a time, that is the most."""
    given = decoder_of(config).head_input
    if given not in solved:
        return 0
    return _factor_bytes(given, 0) + _COPIES * 4 * min(head_step(config), config.vocab_size) * given.width


def _factor_bytes(given: LinearInput, tokens: int) -> int:
    """Returns the bytes that GPTQ holds of an input: its tokens five times over and P, or its second moment and what is
    made of that, as for the head, whose rows come a few at a time."""
    rows = sum(linear.out_features for linear in given.linears)
    if layer_of(given.name) is not None and pays(tokens, given.width, rows):
        return 20 * tokens * given.width + 8 * tokens**2 + 8 * tokens * rows
    return 18 * given.width**2


def _layers_bytes(recipe: Recipe, config: ModelConfig, form: Form, tokens: int) -> int:
    """Returns the float32 weights of layers that are held, and what is made of an input and of those that read it."""
    held, solved = [held_weights(layer) for layer in decoder_of(config).layers], _solved(recipe, config, form)
    if solves_in_step(recipe, config, form):
        # A layer, exact as far as it is not solved yet, and the next one, which is surveyed meanwhile.
        together = max(a + b for a, b in zip(held, [*held[1:], 0], strict=True))
        most = wide_tokens(recipe)
        inside = (given for given in solved if layer_of(given.name) is not None)
        return 4 * together + max(_solving_bytes(given, tokens_taken(tokens, given.width, most)) for given in inside)
    # The exact one and half of one on its way in; with probes or GPTQ a rounded one and what it is made of, and a
    # folded one.
    layers = 4.0 if solved else 2.5 if recipe.bits_per_weight else 1.5
    return int(layers * 4 * max(held)) + max((_factor_bytes(given, tokens) for given in solved), default=0)


def _solving_bytes(given: LinearInput, tokens: int) -> int:
    """Returns what GPTQ holds of an input in a layer: its factor, all that read it once more, and some rows of one in
    all the states they go through."""
    largest = max(linear.out_features for linear in given.linears)
    rows = min(largest, rows_together(given.width))
    return _factor_bytes(given, tokens) + 4 * input_weights(given) + _COPIES * 4 * rows * given.width


def _solved(recipe: Recipe, config: ModelConfig, form: Form) -> list[LinearInput]:
    """Inputs that a matrix reads which is to be solved."""
    specs = planned_specs(config, recipe, form)
    return [
        given for given in decoder_of(config).inputs if any(specs[weight(r)].rounded_by.solves for r in given.readers)
    ]
