"""What every block format does once its scales and zero points are chosen.

`columns` is float32 [block_size, n], one block a column; `scales` and `zeros` are float32 [n].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def inverse(scales: Floats) -> Floats:
    """1/scale, 0 for an all-zero block."""
    return np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)


def round_columns(columns: Floats, scales: Floats, zeros: Floats, bits: int) -> Floats:
    """The integers 0 … 2^bits - 1 as float32 [block_size, n]: round half to even, then clip."""
    q = columns * inverse(scales)
    np.rint(q, out=q)
    q += zeros
    return np.clip(q, 0, (1 << bits) - 1, out=q)


def range_of(columns: Floats) -> tuple[Floats, Floats]:
    """(smallest, largest) value of each block, 0 forced in between, so that zeros and padding are exact."""
    return np.minimum(columns.min(axis=0), 0), np.maximum(columns.max(axis=0), 0)
