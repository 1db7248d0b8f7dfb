"""Columns visited again by operations on whole columns: quant/revisit.py for a device that rounds columns itself.

The same steps, all rows at once: a block's scale refitted, then each of its integers by what is left of its column.
Integers are counted from their zero point and moved in units of the scale, which the columns behind are told in their
own. N output features, Kp input features in whole blocks, n columns of a stride, B columns a block, J = n / B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.device.arrays import Device, device_of
from toolkit.quant.blockwise import QuantSpec
from toolkit.quant.revisit import FURTHEST

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class RevisitedStride:
    """Visits the columns of a stride again. Called with what is left of them [N, n], their part of H [n, n], integers
    from 0 [N, n], scales and zero points [N, J]; returns integers, what they stand for, how far that moved, and
    scales. What is left is used up."""

    bits: int
    block_size: int
    short_scales: bool

    def __call__(
        self, left: Floats, own: Floats, levels: Floats, scales: Floats, zeros: Floats
    ) -> tuple[Floats, Floats, Floats, Floats]:
        on, top, diagonal = device_of(left), float((1 << self.bits) - 1), own.diagonal()
        made, values, moved = on.empty(left.shape), on.empty(left.shape), on.empty(left.shape)
        fitted = on.empty(scales.shape)
        # In units of each column's own part of H: what it waits for, and what the others take from it.
        waiting, taken = on.contiguous((left / diagonal).T), own / diagonal
        for j, first in enumerate(range(0, left.shape[1], self.block_size)):
            some, scale, zero = slice(first, first + self.block_size), scales[:, j], zeros[:, j]
            steps = on.contiguous((levels[:, some] - zero[:, None]).T)
            before = steps * scale
            refitted = _refitted(on, scale, steps, waiting[some] * diagonal[some, None], own[some, some])
            refitted = on.nearest_bfloat16(refitted) if self.short_scales else refitted
            waiting -= taken[some].T @ (steps * (refitted - scale))
            # What a scale of nothing stands for is nothing, and stays.
            inverse, low, high = on.reciprocal(refitted), -zero, top - zero
            for i in range(self.block_size):
                step = on.clip(on.rint(steps[i] + waiting[first + i] * inverse), low, high)
                on.subtract_outer(waiting, taken[first + i], (step - steps[i]) * refitted)
                steps[i] = step
            after = steps * refitted
            made[:, some], values[:, some], moved[:, some] = (steps + zero).T, after.T, (after - before).T
            fitted[:, j] = refitted
        return made, values, moved, fitted


def revisit_on_device(
    white: Floats,
    upper: Floats,
    strides: Sequence[slice],
    spec: QuantSpec,
    levels: Floats,
    visited: Floats,
    scales: Floats,
    zeros: Floats,
    times: int,
) -> None:
    """As `revisit`, in place, with integers and zero points as floats on the device."""
    on, stride = device_of(white), RevisitedStride(spec.bits, spec.block_size, spec.short_scales)
    on.subtract_product(white, visited, upper)
    for some in [*strides] * times:
        rows = upper[some, some.start :]
        blocks = slice(some.start // spec.block_size, some.stop // spec.block_size)
        left, own = white[:, some.start :] @ rows.T, rows @ rows.T
        given = (levels[:, some], scales[:, blocks], zeros[:, blocks])
        levels[:, some], visited[:, some], moved, scales[:, blocks] = on.recorded(stride, left, own, *given)
        on.subtract_product(white[:, some.start :], moved, rows)


def _refitted(on: Device, scale: Floats, steps: Floats, left: Floats, own: Floats) -> Floats:
    """The scale [N] of a block that suits its integers less their zero point, `steps` [B, N], best; the old one where
    they say nothing, or something else altogether."""
    slope, curvature = (steps * left).sum(axis=0), (steps * (own @ steps)).sum(axis=0)
    fitted = scale + slope / on.replaced_zeros(curvature)
    ratio = fitted * on.reciprocal(scale)
    fits = (curvature > 0) & (scale != 0) & (ratio * float(FURTHEST) > 1) & (ratio < float(FURTHEST))
    return on.where(fits, fitted, scale)
