"""GPTQ's columns rounded by operations on whole columns, for a device that no compiled loop reaches.

It is what `gptq_columns` of quant/kernel.py and `round_signed_columns` of quant/signed_kernel.py do, row by row there
and all rows at once here. What a block takes from the columns behind it is one product, and so is what its columns
would be without rounding; within a block all is counted in units of its scale. So a last bit may differ from the
compiled loops'. A stride of columns is hundreds of small steps, always the same ones: the device may record them.
N rows, n columns of a stride, B columns a block, J = n / B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.device.arrays import Device, device_of
from toolkit.quant.blockwise import QuantSpec
from toolkit.quant.kernel import SMALLEST_SCALE, SMALLEST_SEARCHED

Floats = NDArray[np.float32]
_TENTHS: Final = tuple(range(-9, 10, 3))
# Columns between two products where scales stand and no block says so.
_BLOCK: Final = 32


@dataclass(frozen=True)
class SearchedStride:
    """Rounds the columns of a stride, each block by a scale and a zero point that are searched when its turn comes.

    Called with what is left of columns [N, n], U [n, n], the inverses of its blocks [J, B, B], what an error in each
    column is worth [n], and the grid of scales [C]; returns integers from 0 and what they stand for [N, n], scales and
    zero points [N, J]. What is left is used up.
    """

    bits: int
    symmetric: bool
    block_size: int
    short_scales: bool

    def __call__(
        self, left: Floats, upper: Floats, unrounded: Floats, worth: Floats, grid: Floats
    ) -> tuple[Floats, Floats, Floats, Floats]:
        on, top, diagonal = device_of(left), float((1 << self.bits) - 1), upper.diagonal()
        levels, restored = on.empty(left.shape), on.empty(left.shape)
        scales, zeros = list[Floats](), list[Floats]()
        for j, first in enumerate(range(0, left.shape[1], self.block_size)):
            some = slice(first, first + self.block_size)
            scale, zero = _searched(on, left[:, some] @ unrounded[j], worth[some], grid, top, self.symmetric)
            scale = on.nearest_bfloat16(scale) if self.short_scales else scale
            own = upper[some, some] / diagonal[some]
            waiting = on.contiguous((left[:, some] / diagonal[some] * on.reciprocal(scale)[:, None]).T)
            steps, low, high = on.empty(waiting.shape), -zero, top - zero
            for k in range(self.block_size):
                steps[k] = on.clip(on.rint(waiting[k]), low, high)
                on.subtract_outer(waiting[k + 1 :], own[k, k + 1 :], steps[k])
            rounded = steps.T
            levels[:, some], restored[:, some] = rounded + zero[:, None], rounded * scale[:, None]
            left[:, some.stop :] -= restored[:, some] @ upper[some, some.stop :]
            scales.append(scale[:, None])
            zeros.append(zero[:, None])
        return levels, restored, on.concatenate(scales, axis=1), on.concatenate(zeros, axis=1)


@dataclass(frozen=True)
class StandingStride:
    """The same for integers around zero by scales [N, n] that stand, of each column its own: called with what is left
    of columns, U and the scales."""

    bits: int

    def __call__(self, left: Floats, upper: Floats, scales: Floats) -> tuple[Floats, Floats]:
        on, half, diagonal = device_of(left), float(1 << (self.bits - 1)), upper.diagonal()
        levels, restored = on.empty(left.shape), on.empty(left.shape)
        inverse = on.reciprocal(scales) / diagonal
        for first in range(0, left.shape[1], _BLOCK):
            some = slice(first, min(first + _BLOCK, left.shape[1]))
            waiting = on.contiguous(left[:, some].T)
            for k in range(some.stop - first):
                level = on.clip(on.rint(waiting[k] * inverse[:, first + k]), -half, half - 1)
                value = level * scales[:, first + k]
                levels[:, first + k], restored[:, first + k] = level + half, value
                on.subtract_outer(waiting[k + 1 :], upper[first + k, first + k + 1 : some.stop], value)
            left[:, some.stop :] -= restored[:, some] @ upper[some, some.stop :]
        return levels, restored


def searched_stride(
    left: Floats, upper: Floats, worth: Floats, spec: QuantSpec
) -> tuple[Floats, Floats, Floats, Floats]:
    """Integers from 0 and what they stand for [N, n], scales and zero points [N, J] of a stride's columns: `left`
    [N, n], `upper` [n, n], and `worth` [n], which is numpy's, as in the kernel. Valid until the next stride."""
    on, B = device_of(left), spec.block_size
    blocks = [upper[None, first : first + B, first : first + B] for first in range(0, left.shape[1], B)]
    steps = np.float32((1 << spec.bits) / 2 if spec.symmetric else (1 << spec.bits) - 1)
    grid = np.array([steps / (steps + np.float32(tenths) / np.float32(10)) for tenths in _TENTHS], np.float32)
    stride = SearchedStride(spec.bits, spec.symmetric, B, spec.short_scales)
    weights = worth if worth.size else np.ones(left.shape[1], np.float32)
    given = (on.inverse_triangles(on.concatenate(blocks)), on.from_host(weights), on.from_host(grid))
    levels, restored, scales, zeros = on.recorded(stride, left, upper, *given)
    return levels, restored, scales, zeros


def standing_stride(left: Floats, upper: Floats, scales: Floats, bits: int) -> tuple[Floats, Floats]:
    """The same by scales [N, n] that stand, for integers around zero; the integers that come back are counted from
    0."""
    levels, restored = device_of(left).recorded(StandingStride(bits), left, upper, scales)
    return levels, restored


def _searched(
    on: Device, block: Floats, worth: Floats, grid: Floats, top: float, symmetric: bool
) -> tuple[Floats, Floats]:
    """Scales and zero points [N] of a block [N, B]: a grid of ranges, each scale refitted, the best kept."""
    low, start, start_zero = _of_range(on, block, top, symmetric)
    candidates = start[None, :] * grid[:, None]
    inverse = on.reciprocal(candidates)
    zeros = start_zero[None, :] + 0 * candidates if symmetric else on.clip(on.rint(-low * inverse), 0.0, top)
    levels = on.rint(block[None] * inverse[:, :, None])
    levels = on.clip(levels + zeros[:, :, None], 0.0, top) - zeros[:, :, None]
    weighted = worth * levels
    crosses, squares = (weighted * block[None]).sum(axis=-1), (weighted * levels).sum(axis=-1)
    fits = crosses / on.replaced_zeros(squares)
    large = abs(start) > float(SMALLEST_SEARCHED)
    gains = crosses * fits
    scale, zero = (on.at_largest(values, gains) for values in (fits, zeros))
    return on.where(large, scale, start), on.where(large, zero, start_zero)


def _of_range(on: Device, block: Floats, top: float, symmetric: bool) -> tuple[Floats, Floats, Floats]:
    """The smallest value, not above 0, and the scale and zero point of the range, [N] each; zeros are exact."""
    low = on.clip(on.smallest(block, 1), -np.inf, 0.0)
    high = on.clip(on.largest(block, 1), 0.0, np.inf)
    if symmetric:
        half = (top + 1) / 2
        scale = on.where(-low > high, low, high) / -half
        return low, on.where(abs(scale) > float(SMALLEST_SCALE), scale, 0 * scale), 0 * scale + half
    scale = (high - low) / top
    scale = on.where(scale > float(SMALLEST_SCALE), scale, 0 * scale)
    return low, scale, on.clip(on.rint(-low * on.reciprocal(scale)), 0.0, top)
