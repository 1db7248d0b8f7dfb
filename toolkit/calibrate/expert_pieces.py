"""Experts for a pool of workers: one is a piece, with the tokens that chose it, and what it makes of them is added up
here in the order of the experts, as without a pool.

Workers read an expert's matrices themselves and keep none. Some are out at a time, so that what is sent and what comes
back stays within some memory however many there are.
T tokens, D hidden, K input features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.calibrate.input_solver import Fallback, Problem
from toolkit.calibrate.layer_matrices import LayerMatrices, RowsWriter
from toolkit.calibrate.statistics import InputStatistics
from toolkit.checkpoint.linears import LinearInput
from toolkit.checkpoint.sublayers import Expert, Moe
from toolkit.device.fitting import Pool
from toolkit.quant.blockwise import QuantizedBlocks
from toolkit.reference.routing import Chosen, Elsewhere
from toolkit.reference.shared import SharedLayer

Floats = NDArray[np.float32]
# Floats that come back of the experts that are out at once, an expert's blocks counted as an eighth of its weights.
_OUT: Final = 1 << 26


@dataclass(frozen=True)
class SharedExperts:
    """A layer with its experts, what they read [T, D], and what is to be solved, where that is asked for."""

    shared: SharedLayer
    normed: Floats
    problem: Problem | None = None


@dataclass(frozen=True)
class ChosenExpert:
    """An expert with its tokens, and the importance [K] of the columns of its matrices, by tensor."""

    chosen: Chosen
    importance: Mapping[str, Floats]


@dataclass(frozen=True)
class RoundedExpert:
    """What a rounded expert makes of its tokens, [T, D], its matrices that are solved, each with the sum of squares of
    what it was, and those that could not be."""

    output: Floats
    solved: tuple[tuple[str, float, QuantizedBlocks], ...]
    fallbacks: tuple[Fallback, ...]


def seen_elsewhere(pool: Pool, shared: SharedLayer, seen: dict[str, InputStatistics]) -> Elsewhere:
    """Returns what gives a layer's experts to a pool, and puts among those `seen` what it finds their inputs to be."""

    def passing(normed: Floats, chosen: Sequence[Chosen]) -> Iterator[Floats]:
        for some in _out(shared, chosen):
            for output, found in pool.map(_seen_expert, SharedExperts(shared, normed), some):
                seen.update(found)
                yield output

    return passing


def rounded_elsewhere(
    pool: Pool, shared: SharedLayer, problem: Problem, writer: RowsWriter, fallbacks: list[Fallback]
) -> Elsewhere:
    """Returns what gives a layer's experts to a pool, to be rounded or solved there; `writer` takes what is solved, and
    `fallbacks` what could not be."""
    moe = _moe(shared)
    inputs = {given.name for given in moe.inputs}
    tensors = {linear.weight for expert in moe.experts for given in _reads(expert) for linear in given.linears}
    asked = replace(
        problem,
        specs={tensor: problem.specs[tensor] for tensor in tensors},
        values={name: values for name, values in problem.values.items() if name in inputs},
        importance={},
        scales={},
    )

    def passing(normed: Floats, chosen: Sequence[Chosen]) -> Iterator[Floats]:
        for some in _out(shared, chosen):
            weighed = [ChosenExpert(one, _importance(moe.experts[one.expert], problem)) for one in some]
            for made in pool.map(_rounded_expert, SharedExperts(shared, normed, asked), weighed):
                for tensor, signal, blocks in made.solved:
                    writer.write(tensor, 0, signal, blocks)
                fallbacks.extend(made.fallbacks)
                yield made.output

    return passing


def _seen_expert(given: SharedExperts, chosen: Chosen) -> tuple[Floats, dict[str, InputStatistics]]:
    layer, moe, tokens = given.shared.experts(), _moe(given.shared), chosen.tokens
    seen = {
        read.name: InputStatistics(read.name, read.width, tokens.size, sampled=False)
        for read in _reads(moe.experts[chosen.expert])
    }

    def look(read: LinearInput, values: Floats) -> Floats:
        return seen[read.name].add(values)

    return layer.expert(moe, chosen.expert, given.normed[tokens], look), seen


def _rounded_expert(given: SharedExperts, piece: ChosenExpert) -> RoundedExpert:
    if given.problem is None:
        raise ValueError("nothing says how experts are rounded")
    shared, moe, kept = given.shared, _moe(given.shared), _Kept()
    problem = replace(given.problem, importance=piece.importance)
    matrices = LayerMatrices(shared.experts(), shared.source, problem, kept)
    for read in _reads(moe.experts[piece.chosen.expert]):
        matrices.rounded.solved |= {linear.module: read for linear in read.linears}
    x = given.normed[piece.chosen.tokens]
    output = matrices.rounded.expert(moe, piece.chosen.expert, x, matrices.by_routed)
    return RoundedExpert(output, tuple(kept.rows), tuple(matrices.fallbacks))


class _Kept:
    """Keeps what is solved for who sent the expert."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, QuantizedBlocks]] = []

    def write(self, tensor: str, start: int, signal: float, blocks: QuantizedBlocks) -> None:
        """Keeps a matrix, which comes whole."""
        self.rows.append((tensor, signal, blocks))


def _moe(shared: SharedLayer) -> Moe:
    moe = shared.experts().anatomy.mlp
    if not isinstance(moe, Moe):
        raise ValueError(f"layer {shared.index} has no experts")
    return moe


def _reads(expert: Expert) -> tuple[LinearInput, LinearInput]:
    return expert.normed_input, expert.inner_input


def _importance(expert: Expert, problem: Problem) -> dict[str, Floats]:
    tensors = [linear.weight for given in _reads(expert) for linear in given.linears]
    return {tensor: problem.importance[tensor] for tensor in tensors if tensor in problem.importance}


def _out(shared: SharedLayer, chosen: Sequence[Chosen]) -> Iterator[list[Chosen]]:
    """Yields as many of the chosen experts at a time as may be out at once."""
    moe, hidden = _moe(shared), shared.config.hidden_size
    group, size = list[Chosen](), 0
    for one in chosen:
        linears = [linear for given in _reads(moe.experts[one.expert]) for linear in given.linears]
        own = one.tokens.size * hidden + sum(linear.in_features * linear.out_features for linear in linears) // 8
        if group and size + own > _OUT:
            yield group
            group, size = [], 0
        group.append(one)
        size += own
    if group:
        yield group
