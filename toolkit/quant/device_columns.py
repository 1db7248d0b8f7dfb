"""GPTQ's columns rounded by operations on whole columns, for a device that no compiled loop reaches.

It is what `gptq_columns` of quant/kernel.py and `round_signed_columns` of quant/signed_kernel.py do, row by row there
and all rows at once here. What a block takes from the columns behind it is one product, and so is what its columns
would be without rounding: beside the compiled loops a last bit may differ.
N rows, n columns, B columns a block.
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
class RoundedColumns:
    """Levels and what they stand for [N, n] on the device, scales and zero points of each block [N, n / B] on the host;
    no scales where they stood before."""

    levels: Floats
    restored: Floats
    scales: Floats
    zeros: Floats


def searched_columns(left: Floats, upper: Floats, worth: Floats, spec: QuantSpec) -> RoundedColumns:
    """Rounds what is left of columns [N, n], in place, each block by a scale and a zero point that are searched when
    its turn comes; `upper` [n, n] and `worth` [n], which is numpy's, as in the kernel."""
    on, top, triangle = device_of(left), float((1 << spec.bits) - 1), device_of(upper).to_host(upper)
    levels, restored = on.empty(left.shape), on.empty(left.shape)
    scales, zeros = list[Floats](), list[Floats]()
    for first in range(0, left.shape[1], spec.block_size):
        some = slice(first, first + spec.block_size)
        unrounded = np.linalg.inv(triangle[some, some].astype(np.float64)).astype(np.float32)
        block = left[:, some] @ on.from_host(unrounded)
        scale, zero = _searched(on, block, on.from_host(worth[some]), top, spec.symmetric)
        scale = on.nearest_bfloat16(scale) if spec.short_scales else scale
        inverse = on.reciprocal(scale)
        for k in range(some.start, some.stop):
            level = on.clip(on.rint(left[:, k] / float(triangle[k, k]) * inverse) + zero, 0.0, top)
            value = (level - zero) * scale
            levels[:, k], restored[:, k] = level, value
            left[:, k + 1 : some.stop] -= value[:, None] * upper[k, k + 1 : some.stop]
        left[:, some.stop :] -= restored[:, some] @ upper[some, some.stop :]
        scales.append(scale[:, None])
        zeros.append(zero[:, None])
    found = [on.to_host(on.concatenate(parts, axis=1)) for parts in (scales, zeros)]
    return RoundedColumns(levels, restored, *found)


def signed_columns(left: Floats, upper: Floats, scales: Floats, bits: int) -> RoundedColumns:
    """The same by scales [N, n] that stand, numpy's, for integers around zero; levels are counted from 0."""
    on, half, triangle = device_of(left), float(1 << (bits - 1)), device_of(upper).to_host(upper)
    levels, restored, stood = on.empty(left.shape), on.empty(left.shape), on.from_host(scales)
    heard, divisors = on.from_host((scales > 0).astype(np.float32)), on.replaced_zeros(stood)
    for first in range(0, left.shape[1], _BLOCK):
        some = slice(first, min(first + _BLOCK, left.shape[1]))
        for k in range(some.start, some.stop):
            level = on.rint(left[:, k] / float(triangle[k, k]) / divisors[:, k])
            level = on.clip(level, -half, half - 1) * heard[:, k]
            value = level * stood[:, k]
            levels[:, k], restored[:, k] = level + half, value
            left[:, k + 1 : some.stop] -= value[:, None] * upper[k, k + 1 : some.stop]
        left[:, some.stop :] -= restored[:, some] @ upper[some, some.stop :]
    return RoundedColumns(levels, restored, scales[:, :0], scales[:, :0])


def _searched(on: Device, block: Floats, worth: Floats, top: float, symmetric: bool) -> tuple[Floats, Floats]:
    """Scales and zero points [N] of a block [N, B]: a grid of ranges, each scale refitted, the best kept."""
    low, start, start_zero = _of_range(on, block, top, symmetric)
    steps = np.float32((top + 1) / 2 if symmetric else top)
    grid = [steps / (steps + np.float32(tenths) / np.float32(10)) for tenths in _TENTHS]
    candidates = start[None, :] * on.from_host(np.array(grid, np.float32)[:, None])
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
