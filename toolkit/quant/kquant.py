"""The k-quant scale search without data: try a grid of ranges, refit each scale, keep the best block by block.

After llama.cpp's make_qkx2_quants and make_qx_quants. Those let the offset be any float and round it at the end;
MatMulNBits takes integer zero points, so here each candidate is judged with its zero point already rounded.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from toolkit.quant.rounding import Floats, range_of, round_columns
from toolkit.quant.rtn import range_scales

# Steps of range / scale around the full range; a tenth of a step apart as in make_qx_quants.
_CANDIDATES: Final = tuple(0.1 * step for step in range(-9, 10))


def search_scales(columns: Floats, bits: int, symmetric: bool) -> tuple[Floats, Floats]:
    """(scales, zeros) that minimize sum w (x - scale (q - zero))^2 over the grid, w = rms(block) + |x|.

    For given integers l = q - zero (`steps_of`) the best scale is S(wxl)/S(wll) and removes S(wxl)^2/S(wll) from the
    error, so candidates are compared by that alone.
    """
    start, zeros = range_scales(columns, bits, symmetric)
    weights = np.abs(columns)
    weights += np.sqrt(np.mean(columns * columns, axis=0))
    weighted = weights * columns
    low, _ = range_of(columns)
    levels = np.float32((1 << bits) - 1)
    steps = np.float32((1 << (bits - 1)) if symmetric else levels)
    best = np.full(start.shape, -1, np.float32)
    best_scales, best_zeros = start, zeros
    for shift in _CANDIDATES:
        scales = start * (steps / (steps + np.float32(shift)))
        if not symmetric:
            zeros = np.divide(-low, scales, out=np.zeros_like(low), where=scales != 0)
            np.clip(np.rint(zeros, out=zeros), 0, levels, out=zeros)
        steps_of = round_columns(columns, scales, zeros, bits)
        steps_of -= zeros
        cross = np.einsum("bn,bn->n", weighted, steps_of)
        steps_of *= steps_of
        square = np.einsum("bn,bn->n", weights, steps_of)
        square[square == 0] = 1
        fit = cross / square
        gain = cross * fit
        better = gain > best
        best = np.where(better, gain, best)
        best_scales = np.where(better, fit, best_scales)
        best_zeros = np.where(better, zeros, best_zeros)
    return best_scales, best_zeros
