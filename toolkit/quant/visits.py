"""In which order GPTQ rounds a matrix' columns, and what it asks of whoever says what is left of them.

A block of MatMulNBits is visited whole, so that no g_idx is needed.
N output features, K input features, Kp = K padded to whole blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, weights_of_errors

Floats = NDArray[np.float32]
# Columns between two products with all that came before: wide enough for a matrix product to pay.
_STRIDE: Final = 128


@dataclass(frozen=True)
class Visits:
    """The order [Kp] in which columns are rounded, and diag(H) [Kp], which is 0 for what pads the last block."""

    order: NDArray[np.int64]
    diagonal: Floats

    def strides(self, spec: QuantSpec) -> list[slice]:
        """Columns by their place in the order, as many at a time as are rounded between two products."""
        return visit_strides(self.order.size, spec.block_size if not spec.signed else 1)


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


def visit_strides(columns: int, block_size: int) -> list[slice]:
    """Slices of _STRIDE columns, or of a block where that is wider."""
    stride = max(_STRIDE, block_size)
    return [slice(start, min(start + stride, columns)) for start in range(0, columns, stride)]


def visits(moments: Floats, block_size: int) -> Visits:
    """Blocks by their largest diag(H) [K], columns within a block by their own."""
    padded = -(-moments.size // block_size) * block_size
    diagonal = np.zeros(padded, np.float32)
    diagonal[: moments.size] = moments
    blocks = diagonal.reshape(-1, block_size)
    first = np.argsort(-blocks.max(axis=1), kind="stable")
    within = np.argsort(-blocks, axis=1, kind="stable")
    order = (first[:, None] * block_size + within[first]).reshape(-1)
    return Visits(np.asarray(order, np.int64), diagonal)


def worth_of_errors(diagonal: Floats, heard: NDArray[np.bool_]) -> Floats:
    """What an error of a column is worth in the search of its block's scale, [n]: U_kk^2, which is what remains of it
    once the columns behind have made up for it as far as they can, and nothing where the text left a column silent."""
    return weights_of_errors(np.where(heard, np.square(diagonal), 0).astype(np.float32))
