"""Round to nearest: the range of a block decides its scale."""

from __future__ import annotations

import numpy as np

from toolkit.quant.rounding import Floats, inverse, range_of


def range_scales(columns: Floats, bits: int, symmetric: bool) -> tuple[Floats, Floats]:
    """(scales, zeros) of `columns` [block_size, n].

    Symmetric uses the full range: the value of largest magnitude becomes -2^(bits-1) (llama.cpp's Q4_0, MLAS's
    default). Asymmetric spans smallest to largest in 2^bits - 1 steps.
    """
    low, high = range_of(columns)
    half, levels = 1 << (bits - 1), (1 << bits) - 1
    if symmetric:
        extreme: Floats = np.where(-low > high, low, high)
        return extreme / np.float32(-half), np.full_like(extreme, half)
    scales: Floats = (high - low) / np.float32(levels)
    zeros: Floats = np.clip(np.rint(-low * inverse(scales)), 0, levels)
    return scales, zeros
