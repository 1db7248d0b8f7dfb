"""How much there is to do when a recipe's text goes through its checkpoint, counted from shapes.

Counts of elements are passes of numpy or of a compiled loop over an array, in units of what `np.exp` takes for one
value (pipeline/work.py). They were set by profiles of tiny-r1 and of two layers of the 1.5B; those of solving, and
what cores do beside each other, by whole exports of Qwen2.5-Coder-0.5B and 1.5B on a quiet machine (LOG.md).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from toolkit.calibrate.statistics import InputStatistics
from toolkit.calibrate.survey import probe_tokens
from toolkit.calibrate.tuning import TOKENS_A_STEP
from toolkit.checkpoint.anatomy import DecoderLayer, decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.linears import LinearInput
from toolkit.names import layer_of, weight
from toolkit.pipeline.text import LONGEST
from toolkit.pipeline.work import Work
from toolkit.quant.awq import CANDIDATES, FIRST_CANDIDATES, thinned_count
from toolkit.quant.blockwise import QuantSpec
from toolkit.quant.formats import budget_blocks, other_formats
from toolkit.quant.gptq_tokens import pays, products_of_moment, products_of_tokens, tokens_taken

# Passes over a weight: to search its scale and round it, to restore it, to solve its column.
PASSES_TO_SEARCH: Final = 26.0
PASSES_TO_RESTORE: Final = 6.0
PASSES_TO_SOLVE: Final = 60.0
# To refit its scale and look at its integer again.
_REVISITED: Final = 190.0
# Over a value of an input: to round it as the bundle does, and what a survey keeps of it.
_ROUNDED: Final = 14.0
_KEPT: Final = 4.0
# Over a weight in a step of tuning: to restore it, and to gather its gradient.
_TUNED: Final = 4.0
# Calls of numpy in a layer's forward, and in judging a scale.
_LAYER_STEPS: Final = 150.0
_SCALE_STEPS: Final = 45.0
# Passes by rows take every core, and the next layer's survey takes what solving leaves idle: the seconds of several
# cores, as a share of what one takes, times their number.
_SHARED: Final = 0.8
# A stream of GPTQ goes through some of a layer's steps twice.
_STREAM: Final = 1.6


def forward_work(config: ModelConfig, tokens: float, length: int, sequences: float) -> Work:
    """One pass of so many tokens, in sequences of `length`, through every layer of the reference."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    weights = active_weights(config)
    products = 2.0 * weights * tokens + 4.0 * layers * tokens * length * config.q_size
    a_token = 25.0 * config.hidden_size + 15.0 * config.intermediate_size + 20.0 * (config.q_size + config.kv_size)
    elements = layers * tokens * (a_token + 15.0 * heads * length)
    return Work(products, elements, _LAYER_STEPS * layers * sequences)


def tuning_work(config: ModelConfig, tokens: int, steps: int) -> Work:
    """The checkpoint's pass over the text, and for each step one through the bundle's weights and two back."""
    length, a_step = min(LONGEST, tokens), min(TOKENS_A_STEP, tokens)
    head = Work(products=2.0 * config.vocab_size * config.hidden_size, elements=6.0 * config.vocab_size)
    through = forward_work(config, a_step, length, a_step / length)
    rebuilt = Work(elements=_TUNED * (active_weights(config) + config.vocab_size * config.hidden_size))
    exact = forward_work(config, tokens, length, tokens / length)
    return exact + (through * 3.0 + head * (4.0 * a_step) + rebuilt) * steps


def layer_weights(config: ModelConfig) -> int:
    """The weights of all layers' matrices."""
    return sum(input_weights(given) for layer in decoder_of(config).layers for given in layer.inputs)


def active_weights(config: ModelConfig) -> int:
    """The weights of all layers that one token goes through: those of a layer's experts count by the chosen ones."""
    experts = config.structure.experts
    chosen = experts.per_token / experts.count if experts else 1.0
    inputs = [given for layer in decoder_of(config).layers for given in layer.inputs]
    return int(sum(input_weights(given) * (chosen if given.routed else 1.0) for given in inputs))


def held_weights(layer: DecoderLayer) -> int:
    """The weights of a layer that are in memory together: of its experts one at a time."""
    return sum(input_weights(given) for given in layer.inputs if not given.routed) + max(
        (input_weights(given) for given in layer.inputs if given.routed), default=0
    )


def survey_work(config: ModelConfig, specs: dict[str, QuantSpec], tokens: int, folds: bool, probes: bool) -> Work:
    """The survey: the text through the layers, scales of channels tried, and the probes of a budget."""
    length = min(LONGEST, tokens)
    done = forward_work(config, tokens, length, tokens / length)
    sampled = InputStatistics.sampled(tokens)
    blocks = budget_blocks(specs.values())
    for given in decoder_of(config).inputs:
        if given.routed:
            continue  # looked at by few tokens each, and not folded
        done += Work(elements=_KEPT * given.width * tokens)
        own = specs[weight(given.readers[0])]
        formats = len(other_formats(own, given.width, block_sizes=blocks)) if probes else 0
        solved = any(specs[weight(reader)].rounded_by.solves for reader in given.readers)
        tried = ((FIRST_CANDIDATES if solved else CANDIDATES) if folds and given.writers else 0) + formats
        for linear in given.linears:
            done += _judged(thinned_count(linear.out_features), given.width, sampled) * tried
    return _by_cores(done + _probes(config, tokens) if probes else done)


def solving_work(
    config: ModelConfig,
    solved: Sequence[LinearInput],
    tokens: int,
    streams: int,
    revisits: int = 0,
    wide_tokens: int = 0,
) -> Work:
    """GPTQ: one stream through the layers, or two, the products of each input, its columns one after the other, and
    again as often as `revisits` says; of wide inputs at most `wide_tokens` are taken, 0 for all."""
    length = min(LONGEST, tokens)
    done = _by_cores(forward_work(config, tokens, length, tokens / length) * (_STREAM * streams))
    experts = config.structure.experts
    to_one = int(tokens * experts.per_token / experts.count) if experts else tokens
    for given in solved:
        weights, seen = input_weights(given), to_one if given.routed else tokens
        rows = weights // given.width
        taken = tokens_taken(seen, given.width, wide_tokens)
        by_tokens = layer_of(given.name) is not None and pays(taken, given.width, rows)
        again = 0 if by_tokens else revisits
        if by_tokens:
            factored = products_of_tokens(taken, given.width, rows)
        else:
            factored = products_of_moment(seen, given.width, rows)
        done += Work(
            products=factored + 2.0 * weights * given.width * (again + (again > 0)),
            elements=(PASSES_TO_SOLVE + _REVISITED * again) * weights / (os.cpu_count() or 1),
        )
        passed = 2 * PASSES_TO_RESTORE * weights + _ROUNDED * given.width * seen * (1 + len(given.readers))
        done += _by_cores(Work(elements=passed))
    return done


def ranges_work(config: ModelConfig, tokens: int) -> Work:
    """The ranges of uint16 activations: the text through the weights read back from the packed files."""
    length = min(LONGEST, tokens)
    widths = sum(given.width for given in decoder_of(config).inputs)
    return forward_work(config, tokens, length, tokens / length) + Work(
        elements=2 * PASSES_TO_RESTORE * layer_weights(config) + 4 * _KEPT * widths * tokens
    )


def _by_cores(work: Work) -> Work:
    """The same work where every core passes over its part of the elements."""
    return replace(work, elements=work.elements * min(1.0, _SHARED / (os.cpu_count() or 1)))


def _judged(rows: int, width: int, sampled: int) -> Work:
    """One format or scale of one reader judged by the error of its output on the sample."""
    rounded = (PASSES_TO_SEARCH + PASSES_TO_RESTORE) * rows * width
    return Work(
        products=2.0 * rows * width * sampled,
        elements=rounded + _ROUNDED * width * sampled + 3.0 * rows * sampled,
        steps=_SCALE_STEPS,
    )


def _probes(config: ModelConfig, tokens: int) -> Work:
    """Copies of some of the text that start at each input and go on to the model's end, the head's rounding too."""
    layers, some = config.num_hidden_layers, probe_tokens(tokens, config.num_hidden_layers)
    pieces = max(1.0, some / LONGEST)
    # Each layer is passed by the exact probe, by four that start in it, and by those that came before.
    passed = sum(6 + 4 * k for k in range(layers)) / layers
    table = config.vocab_size * config.hidden_size
    ended = (4 * layers + 3) * some
    return (
        forward_work(config, some, min(some, LONGEST), pieces) * passed
        + Work(elements=(PASSES_TO_SEARCH + PASSES_TO_RESTORE) * (layer_weights(config) + table))
        + Work(products=2.0 * ended * table, elements=8.0 * ended * config.vocab_size)
    )


def input_weights(given: LinearInput) -> int:
    """The weights of the matrices that read an input."""
    return sum(linear.out_features for linear in given.linears) * given.width
