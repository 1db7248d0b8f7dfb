"""In which order GPTQ rounds a matrix' columns, and what it asks of whoever says what is left of them.

A block of MatMulNBits is visited whole, so that no g_idx is needed, and so is a wider one of another matrix that reads
the same input: sizes are powers of two, so that narrower blocks lie within wider ones.
N output features, K input features, Kp = K padded to whole blocks.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, weights_of_errors

Floats = NDArray[np.float32]
# Columns between two products with all that came before: wide enough for a matrix product to pay.
_STRIDE: Final = 128


@dataclass(frozen=True)
class Visits:
    """The order [Kp] in which columns are rounded, diag(H) [Kp], which is 0 for what pads the last block, and the size
    of the widest blocks."""

    order: NDArray[np.int64]
    diagonal: Floats
    widest: int

    def strides(self, spec: QuantSpec) -> list[slice]:
        """Columns by their place in the order, as many at a time as are rounded between two products: _STRIDE, or a
        block where that is wider. Signed columns may be parted anywhere."""
        stride = _STRIDE if spec.signed else max(_STRIDE, self.widest)
        return [slice(start, min(start + stride, self.order.size)) for start in range(0, self.order.size, stride)]


@dataclass(frozen=True)
class Solved:
    """A solved matrix: its blocks, in the layout of `quantize_blocks`, and the float32 [N, K] they stand for, on the
    device of what was solved."""

    blocks: QuantizedBlocks
    restored: Floats


class Columns(Protocol):
    """What is left of a matrix' columns while they are rounded."""

    def left(self, some: slice, visited: Floats) -> tuple[Floats, Floats]:
        """z [N, n] and U [n, n] of some columns by their place in the order, those before them restored as `visited`
        [N, some.start] has them: column k is best rounded from (z_k - sum over the columns j of `some` before k of
        q_j U_jk) / U_kk."""
        ...

    def whole(self) -> tuple[Floats, Floats] | None:
        """z [N, Kp], to be used up, and U [Kp, Kp] of all columns once they are rounded, where they are at hand."""
        ...


def blocks_of(specs: Collection[QuantSpec], channels: int) -> set[int]:
    """Returns the block sizes of matrices of these specs that read an input of so many channels: signed ones, whose
    scales stand beforehand, may be visited in any order."""
    return {channels if spec.signed else spec.block_size for spec in specs}


def visits(moments: Floats, block_sizes: Collection[int]) -> Visits:
    """Blocks by their largest diag(H) [K], the widest first, narrower ones within them, and columns within those by
    their own."""
    widest = max(block_sizes)
    diagonal = np.zeros(-(-moments.size // widest) * widest, np.float32)
    diagonal[: moments.size] = moments
    place = np.arange(diagonal.size)
    keys: list[NDArray[Any]] = [-diagonal]
    for size in sorted(set(block_sizes)):
        largest = diagonal.reshape(-1, size).max(axis=1)
        keys += [place // size, -np.repeat(largest, size)]
    return Visits(np.lexsort(keys), diagonal, widest)


def worth_of_errors(diagonal: Floats, heard: NDArray[np.bool_]) -> Floats:
    """What an error of a column is worth in the search of its block's scale, [n]: U_kk^2, which is what remains of it
    once the columns behind have made up for it as far as they can, and nothing where the text left a column silent."""
    return weights_of_errors(np.where(heard, np.square(diagonal), 0).astype(np.float32))
