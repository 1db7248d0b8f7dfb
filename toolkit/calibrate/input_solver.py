"""The matrices that read one input: how they are stored, and how they are solved once the input is known.

T tokens, N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.calibrate.pieces import SharedRows, factored
from toolkit.calibrate.side_by_side import (
    InputFactor,
    MatrixRows,
    RowSource,
    joined,
    rows_of,
    solve_rows,
    solve_side_by_side,
)
from toolkit.calibrate.statistics import Products
from toolkit.checkpoint.linears import LinearInput
from toolkit.device.arrays import Device
from toolkit.device.fitting import Pool
from toolkit.quant.activations import Rounding, rounded_input
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, dequantize_blocks, quantize_blocks
from toolkit.quant.gptq import Factor, NotPositiveDefiniteError, factorize
from toolkit.quant.gptq_tokens import TokenFactor, factorize_tokens, pays, tokens_taken
from toolkit.quant.ranges import ActivationRange
from toolkit.quant.visits import Solved, blocks_of
from toolkit.reference.decoder import rows_together
from toolkit.reference.shared import SharedLayer

Floats = NDArray[np.float32]
# Elements of matrices that a device solves as one: what it makes of them is some gigabytes.
_DEVICE_ELEMENTS: Final = 1 << 28


@dataclass(frozen=True)
class Fallback:
    """A matrix that was rounded with importance weights instead, and why."""

    tensor: str
    reason: str


@dataclass(frozen=True)
class Problem:
    """What to solve. `specs` has the format of every matrix; `importance` by tensor serves where GPTQ cannot.
    `rounding` is what the bundle does to the input of a linear in a layer, `head_rounding` to the head's, `values` has
    the range of each input by its name, and `scales` what is folded into it, if anything is. Solved columns are visited
    again as often as `revisits` says; of a wide input at most `wide_tokens` are taken, 0 for all."""

    specs: Mapping[str, QuantSpec]
    importance: Mapping[str, Floats]
    rounding: Rounding
    head_rounding: Rounding
    values: Mapping[str, ActivationRange]
    scales: Mapping[str, Floats]
    revisits: int = 0
    wide_tokens: int = 0

    def arriving(self, given: LinearInput, reader: str, x: Floats) -> Floats:
        """An input [T, K] as the bundle's product with one of its readers sees it."""
        rounding = self.rounding if names.layer_of(given.name) is not None else self.head_rounding
        if rounding is Rounding.NONE:
            return x
        return rounded_input(x, rounding, self.specs[names.weight(reader)].block_size, self.values[given.name])


class InputSolver:
    """The matrices that read one input, once that is gathered; `wanted` are those to be solved. A pool reads their rows
    from what is `shared`, or from what `solved` is given."""

    def __init__(
        self, given: LinearInput, problem: Problem, on: Device, pool: Pool | None, shared: SharedLayer | None
    ) -> None:
        tensors = [names.weight(reader) for reader in given.readers]
        self.wanted = [tensor for tensor in tensors if problem.specs[tensor].rounded_by.solves]
        self._given, self._problem, self._on = given, problem, on
        self._specs = list(dict.fromkeys(problem.specs[tensor] for tensor in self.wanted))
        self._pool, self._layer = pool, shared
        self._factor: Factor | TokenFactor | None = None
        self._whitening: Floats | None = None
        self._products: dict[str, Floats] = {}
        self.fallbacks: list[Fallback] = []

    def gather(
        self,
        pairs: Iterator[tuple[Floats, Floats]],
        tokens: int,
        rows: Mapping[str, Floats] | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """The factor and what the targets need, from every sequence's exact and arriving input, `tokens` in all; `rows`
        are the matrices where they are at hand. `meanwhile` may give a pool more to do, of which most processes wait
        while one makes the factor."""
        outputs, width = sum(weight.shape[0] for weight in rows.values()) if rows else 0, self._given.width
        taken = tokens_taken(tokens, width, self._problem.wide_tokens)
        # P of all tokens is one product after the other: nothing for several workers.
        by_tokens = bool(rows) and not self._pool and pays(taken, width, outputs)
        some = _evenly(pairs, tokens, taken, self._on) if by_tokens and taken < tokens else pairs
        arrived = ((x, self._problem.arriving(self._given, self._given.name, arriving)) for x, arriving in some)
        try:
            if by_tokens:
                exact, arriving = (self._on.concatenate(side) for side in zip(*arrived, strict=True))
                self._factor = factorize_tokens(exact, arriving, *self._specs)
            else:
                self._factor, self._whitening = self._of_products(arrived, rows, meanwhile)
        except NotPositiveDefiniteError as failed:
            self.fallbacks += [Fallback(tensor, str(failed)) for tensor in self.wanted]

    def solved(self, weights: Mapping[str, Floats]) -> dict[str, Solved]:
        """Whole matrices, solved where that was asked for and possible, else rounded."""
        if self._on.rounds_columns and self._factor and not self._pool:
            return self._by_format(weights)
        wanted = [tensor for tensor in weights if tensor in self.wanted]
        found = self.side_by_side(self._layer, {tensor: [weights[tensor].shape[0]] for tensor in wanted})
        specs, width = self._problem.specs, self._given.width
        made = {
            tensor: Solved(blocks, dequantize_blocks(blocks, specs[tensor], width))
            for tensor, blocks in zip(wanted, found, strict=False)
        }
        return made | {tensor: self._whole(tensor, weight) for tensor, weight in weights.items() if tensor not in made}

    def _by_format(self, weights: Mapping[str, Floats]) -> dict[str, Solved]:
        """The same, matrices of one format as one: a device rounds a column of many rows as soon as one of few."""
        formats, made = dict[QuantSpec, list[str]](), dict[str, Solved]()
        for tensor in self.wanted:
            formats.setdefault(self._problem.specs[tensor], []).append(tensor)
        for spec, tensors in formats.items():
            together = self._on.concatenate([weights[tensor] for tensor in tensors])
            parts = [self._products[tensor] for tensor in tensors if tensor in self._products]
            product = self._on.concatenate(parts) if parts else None
            whole, start = self._in_pieces(together, spec, product), 0
            for tensor in tensors:
                rows = slice(start, start + weights[tensor].shape[0])
                noise = self._on.square_sum(whole.restored[rows] - weights[tensor])
                made[tensor] = Solved(rows_of(whole.blocks, rows, noise), whole.restored[rows])
                start = rows.stop
        return made | {t: self._whole(t, weight) for t, weight in weights.items() if t not in made}

    def _in_pieces(self, weight: Floats, spec: QuantSpec, product: Floats | None) -> Solved:
        assert self._factor is not None
        shared, step = self._input_factor(self._factor), max(1, _DEVICE_ELEMENTS // weight.shape[1])
        some = (slice(start, start + step) for start in range(0, weight.shape[0], step))
        made = [solve_rows(shared, weight[s], spec, None if product is None else product[s]) for s in some]
        return Solved(joined([one.blocks for one in made]), self._on.concatenate([one.restored for one in made]))

    def _whole(self, tensor: str, weight: Floats) -> Solved:
        """A matrix, so many rows at a time that what they are made of is less than a large one itself."""
        step = rows_together(self._given.width)
        if weight.shape[0] <= step:
            return self.rows(tensor, weight)
        blocks, restored = list[QuantizedBlocks](), self._on.empty(weight.shape)
        for start in range(0, weight.shape[0], step):
            made = self.rows(tensor, weight[start : start + step], start)
            restored[start : start + step] = made.restored
            blocks.append(made.blocks)
        return Solved(joined(blocks), restored)

    def rows(self, tensor: str, weight: Floats, start: int = 0) -> Solved:
        """Rows [n, K] of a matrix from its row `start` on, solved here where that was asked for and possible, else
        rounded."""
        spec, factor = self._problem.specs[tensor], self._factor
        if tensor not in self.wanted or factor is None:
            blocks = quantize_blocks(self._on.to_host(weight), spec, self._problem.importance.get(tensor))
            return Solved(blocks, self._on.from_host(dequantize_blocks(blocks, spec, weight.shape[1])))
        shared = self._input_factor(factor)
        product = self._products.get(tensor)
        own = None if product is None else product[start : start + weight.shape[0]]
        return solve_rows(shared, weight, spec, own)

    def side_by_side(self, source: RowSource | None, ends: Mapping[str, Sequence[int]]) -> list[QuantizedBlocks]:
        """Rows up to each of these ends of each matrix, solved by the pool, whose processes read them from a source;
        none where there is no pool, or nothing to solve by."""
        if not (self._pool and self._factor and source and ends):
            return []
        shared = self._input_factor(self._factor, source)
        specs, products = self._problem.specs, self._products
        wanted = [
            MatrixRows(tensor, start, stop, specs[tensor], products.get(tensor))
            for tensor, stops in ends.items()
            for start, stop in pairwise([0, *stops])
        ]
        return solve_side_by_side(self._pool, shared, wanted)

    def _input_factor(self, factor: Factor | TokenFactor, rows: RowSource | None = None) -> InputFactor:
        return InputFactor(factor, self._whitening, self._problem.revisits, rows)

    def _of_products(
        self, arrived: Iterator[tuple[Floats, Floats]], rows: Mapping[str, Floats] | None, meanwhile: Callable[[], None]
    ) -> tuple[Factor, Floats | None]:
        block_sizes = blocks_of(self._specs, self._given.width)
        counts = {tensor: weight.shape[0] for tensor, weight in (rows or {}).items()}
        few = 0 < sum(counts.values()) < self._given.width
        if self._pool:
            exact, arriving = zip(*arrived, strict=True)
            named = SharedRows(self._layer, counts) if self._layer and few else None
            factor, made = factored(self._pool, exact, arriving, named, block_sizes, meanwhile)
        else:
            together = self._on.concatenate(list(rows.values())) if rows and few else None
            gathered = Products(self._given.width, together, self._on)
            for one, other in arrived:
                gathered.add(one, other)
            moment, made = gathered.result()
            factor = factorize(moment, block_sizes, gathered.tokens)
            made = made if few else factor.whitening(made)
        if not few:
            return factor, made
        ends = np.cumsum(list(counts.values()))
        self._products = {
            tensor: made[end - count : end] for (tensor, count), end in zip(counts.items(), ends, strict=True)
        }
        return factor, None


def _evenly(
    pairs: Iterator[tuple[Floats, Floats]], tokens: int, taken: int, on: Device
) -> Iterator[tuple[Floats, Floats]]:
    """Yields, of the exact and arriving values [T, K] of sequences of so many tokens in all, those that are `taken`,
    evenly spaced over the text."""
    chosen, start = np.linspace(0, tokens - 1, taken).round().astype(np.int64), 0
    for exact, arriving in pairs:
        stop = start + arriving.shape[0]
        rows = on.index(chosen[(chosen >= start) & (chosen < stop)] - start)
        yield exact[rows], arriving[rows]
        start = stop
