"""Matrices that read one input, solved side by side: rows are independent once the input's factor is known.

Rows go out in blocks of one size whatever the number of workers, so that the same products are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.device.fitting import Pool
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec
from toolkit.quant.gptq import Factor
from toolkit.quant.gptq_tokens import TokenFactor
from toolkit.quant.visits import Solved

Floats = NDArray[np.float32]
# Rows of a matrix that are solved at once.
ROWS: Final = 1024


@dataclass(frozen=True)
class InputFactor:
    """What all rows share: the factor of their input, X'X~ / T where their products with it are yet to be made, and how
    often solved columns are visited again."""

    factor: Factor | TokenFactor
    cross: Floats | None
    revisits: int = 0


@dataclass(frozen=True)
class RowBlock:
    """Some rows of a matrix, how they are stored, and their W X'X~ / T where that is known."""

    weight: Floats
    spec: QuantSpec
    product: Floats | None


def solve_rows(shared: InputFactor, rows: RowBlock) -> Solved:
    """Rows [n, K] solved against their input."""
    if isinstance(shared.factor, TokenFactor):
        return shared.factor.solved(rows.weight, rows.spec)
    product = rows.product if shared.cross is None else rows.weight @ shared.cross
    return shared.factor.solved(rows.weight, rows.spec, product, shared.revisits)


def solve_side_by_side(
    pool: Pool,
    shared: InputFactor,
    weights: Mapping[str, Floats],
    specs: Mapping[str, QuantSpec],
    products: Mapping[str, Floats],
) -> dict[str, Solved]:
    """Every matrix [N, K] solved, in blocks of rows that a pool works on; `products` has W X'X~ / T by tensor where
    `shared` has no X'X~ / T."""
    pieces, starts = list[RowBlock](), dict[str, tuple[int, int]]()
    for tensor, weight in weights.items():
        begin, product = len(pieces), products.get(tensor)
        for start in range(0, weight.shape[0], ROWS):
            some = slice(start, start + ROWS)
            pieces.append(RowBlock(weight[some], specs[tensor], None if product is None else product[some]))
        starts[tensor] = (begin, len(pieces))
    made = pool.map(solve_rows, shared, pieces)
    return {tensor: _joined(made[begin:end]) for tensor, (begin, end) in starts.items()}


def _joined(parts: list[Solved]) -> Solved:
    blocks = [part.blocks for part in parts]
    points = [block.zero_points for block in blocks if block.zero_points is not None]
    joined = QuantizedBlocks(
        np.concatenate([block.packed for block in blocks]),
        np.concatenate([block.scales for block in blocks]),
        np.concatenate(points) if points else None,
        sum(block.noise for block in blocks),
    )
    return Solved(joined, np.concatenate([part.restored for part in parts]))
