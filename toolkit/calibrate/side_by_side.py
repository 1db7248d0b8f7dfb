"""Matrices that read one input, solved side by side: rows are independent once the input's factor is known.

Rows go out in blocks of one size whatever the number of workers, so that the same products are computed; whoever solves
some reads them for itself, and gives back their blocks alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit.device.fitting import Pool
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec
from toolkit.quant.gptq import Factor
from toolkit.quant.gptq_tokens import TokenFactor
from toolkit.quant.visits import Solved

Floats = NDArray[np.float32]
# Rows that a process works on at once, at most: so few that a narrow matrix too is work for several.
ROWS: Final = 256


class RowSource(Protocol):
    """What rows of matrices are read from."""

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Returns rows [start, stop) of a matrix."""
        ...


@dataclass(frozen=True)
class InputFactor:
    """What all rows share: the factor of their input, the whitening of X'X~ / T where their products with that are not
    known, how often solved columns are visited again, and what rows are read from where others solve them."""

    factor: Factor | TokenFactor
    whitening: Floats | None
    revisits: int = 0
    rows: RowSource | None = None


@dataclass(frozen=True)
class MatrixRows:
    """Rows [start, stop) of a tensor, how they are stored, and their W X'X~ / T where that is known."""

    tensor: str
    start: int
    stop: int
    spec: QuantSpec
    product: Floats | None

    def part(self, start: int, stop: int) -> MatrixRows:
        """Returns some of these rows, counted from the first of them."""
        product = None if self.product is None else self.product[start:stop]
        return replace(self, start=self.start + start, stop=self.start + stop, product=product)


def solve_rows(shared: InputFactor, weight: Floats, spec: QuantSpec, product: Floats | None) -> Solved:
    """Rows [n, K] solved against their input, with their W X'X~ / T where that is known."""
    if isinstance(shared.factor, TokenFactor):
        return shared.factor.solved(weight, spec)
    if shared.whitening is not None:
        return shared.factor.solved_by(shared.whitening, weight, spec, shared.revisits)
    return shared.factor.solved(weight, spec, product, shared.revisits)


def row_pieces(count: int) -> list[slice]:
    """Returns so many rows in pieces, each as large as the others: where two processes have four pieces, a short one
    leaves one of them waiting."""
    pieces = -(-count // ROWS)
    ends = [count * k // pieces for k in range(pieces + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)]


def solve_side_by_side(pool: Pool, shared: InputFactor, matrices: Sequence[MatrixRows]) -> list[QuantizedBlocks]:
    """Every matrix [N, K] solved, in blocks of rows that a pool works on."""
    pieces, ends = list[MatrixRows](), list[tuple[int, int]]()
    for matrix in matrices:
        begin = len(pieces)
        pieces += [matrix.part(some.start, some.stop) for some in row_pieces(matrix.stop - matrix.start)]
        ends.append((begin, len(pieces)))
    made = pool.map(_solve_piece, shared, pieces)
    return [joined(made[begin:end]) for begin, end in ends]


def _solve_piece(shared: InputFactor, piece: MatrixRows) -> QuantizedBlocks:
    if shared.rows is None:
        raise ValueError("the factor names nothing to read rows from")
    weight = shared.rows.read_rows(piece.tensor, piece.start, piece.stop)
    return solve_rows(shared, weight, piece.spec, piece.product).blocks


def joined(parts: Sequence[QuantizedBlocks]) -> QuantizedBlocks:
    """Rows of a matrix below each other."""
    points = [block.zero_points for block in parts if block.zero_points is not None]
    return QuantizedBlocks(
        np.concatenate([block.packed for block in parts]),
        np.concatenate([block.scales for block in parts]),
        np.concatenate(points) if points else None,
        sum(block.noise for block in parts),
    )


def rows_of(blocks: QuantizedBlocks, rows: slice, noise: float) -> QuantizedBlocks:
    """Some rows of a matrix, whose errors are known."""
    points = None if blocks.zero_points is None else blocks.zero_points[rows]
    return QuantizedBlocks(blocks.packed[rows], blocks.scales[rows], points, noise)
