"""The matrices of a layer that is being solved: as they are, as they are stored, and how these follow from those.

T tokens, K input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit.calibrate.experts import FEWEST_ROUTED, with_rounded_experts
from toolkit.calibrate.input_solver import Fallback, InputSolver, Problem
from toolkit.calibrate.pieces import SolvedMatrix
from toolkit.checkpoint.linears import Linear, LinearInput
from toolkit.checkpoint.weights import Tensors
from toolkit.device.fitting import Pool
from toolkit.quant.blockwise import QuantizedBlocks
from toolkit.reference.decoder import Layer
from toolkit.reference.shared import SharedLayer

Floats = NDArray[np.float32]


class RowsWriter(Protocol):
    """Takes rows as they are solved."""

    def write(self, tensor: str, start: int, signal: float, blocks: QuantizedBlocks) -> None:
        """Rows [start, …) of a tensor, the sum of squares of what they were, and as they are stored."""
        ...


class ArrivingLayer(Layer):
    """A layer whose linears see their input as the bundle's will once they are solved: `solved` has that input by
    module."""

    def __init__(self, exact: Layer, source: Tensors, problem: Problem) -> None:
        tensors = with_rounded_experts(exact, source, problem.specs, problem.importance)
        super().__init__(exact.config, exact.anatomy, tensors, exact.on)
        self.solved: dict[str, LinearInput] = {}
        # What workers are not sent: the importance and the scales of a whole model.
        self._problem = replace(problem, importance={}, scales={})

    def product(self, linear: Linear, x: Floats) -> Floats:
        """Returns the product [T, out_features] of the input as the bundle rounds it."""
        if linear.module in self.solved:
            x = self._problem.arriving(self.solved[linear.module], linear.module, x)
        return super().product(linear, x)


class LayerMatrices:
    """A layer's matrices as they are in `exact`, and those of `rounded` that replace them as they are solved; a pool
    reads them from what is `shared`, and is sent those of `packed` as they are."""

    def __init__(
        self,
        exact: Layer,
        source: Tensors,
        problem: Problem,
        writer: RowsWriter,
        pool: Pool | None = None,
        shared: SharedLayer | None = None,
    ) -> None:
        self.rounded = ArrivingLayer(exact, source, problem)
        self.packed: dict[str, SolvedMatrix] = {}
        self.fallbacks: list[Fallback] = []
        self._exact, self._problem, self._writer, self._pool, self._shared = exact, problem, writer, pool, shared
        self._passing: tuple[str, list[str]] = "", []

    def solve(
        self,
        given: LinearInput,
        pairs: Iterator[tuple[Floats, Floats]],
        tokens: int,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Solves the matrices that read an input, of which `pairs` have the exact and the arriving values."""
        solver = InputSolver(given, self._problem, self._exact.on, self._pool, self._shared)
        weights = {linear.weight: self._exact.tensors[linear.weight] for linear in given.linears}
        if solver.wanted:
            solver.gather(pairs, tokens, {tensor: weights[tensor] for tensor in solver.wanted}, meanwhile)
        self.fallbacks += solver.fallbacks
        made = solver.solved(weights)
        for linear in given.linears:
            tensor = linear.weight
            weight, solved = weights[tensor], made[tensor]
            if tensor in solver.wanted:
                self._writer.write(tensor, 0, self._exact.on.square_sum(weight), solved.blocks)
            self.rounded.tensors[tensor] = solved.restored
            if self._pool:
                self.packed[tensor] = SolvedMatrix(solved.blocks, self._problem.specs[tensor], given.width)
            self.rounded.solved[linear.module] = given

    def by_routed(self, given: LinearInput, arrived: Floats) -> Floats:
        """Solves what reads an input of an expert from the tokens that come there, if they are enough, and gives these
        back. The expert before it is forgotten: together they would be the layer's memory many times over."""
        expert = given.name.rpartition(".")[0]
        if expert != self._passing[0]:
            for tensor in self._passing[1]:
                self.rounded.tensors.pop(tensor)
            self._passing = expert, []
        solves = given.routed and any(self._problem.specs[linear.weight].rounded_by.solves for linear in given.linears)
        if solves and arrived.shape[0] >= FEWEST_ROUTED:
            # What it would have read in the exact stream is not kept; what rounding its input costs is made up for.
            self.solve(given, iter([(arrived, arrived)]), arrived.shape[0])
            self._passing[1].extend(linear.weight for linear in given.linears)
        return arrived
