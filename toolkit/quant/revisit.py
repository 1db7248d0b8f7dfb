"""Columns visited again once all are rounded: scales refitted to their integers, integers moved to nearer ones.

GPTQ rounds a column without knowing how those behind it will fall. When all stand, the loss of a row,
|z - q U|^2 (quant/gptq.py), is still smaller for some: a scale by least squares along its block's integers, then each
integer by what is left of its column, one block after the other. No step makes the loss larger (coordinate descent, as
in QuantEase, arXiv 2309.01885). What it is worth stands in LOG.md.

Of `some` columns at a time two products are taken, what is left of them, G = (z - q U) U_some', and their own part
S = U_some U_some' of H; compiled loops do the rest on the host.
N output features, Kp input features in whole blocks, n columns at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from toolkit.device.arrays import device_of
from toolkit.machine import threads
from toolkit.quant.blockwise import QuantSpec
from toolkit.quant.kernel import compiled, nearest_bfloat16, take_share

Floats = NDArray[np.float32]
_F: Final = np.float32
# A refitted scale below this part of the old one, or above as many of it, is another grid, not a better fit.
FURTHEST: Final = np.float32(2)


def revisit(
    white: Floats,
    upper: Floats,
    strides: Sequence[slice],
    spec: QuantSpec,
    levels: NDArray[np.uint8],
    visited: Floats,
    scales: Floats,
    zeros: NDArray[np.uint8],
    times: int,
) -> None:
    """Lowers |z - q U|^2 for z = `white` [N, Kp], which is used up, in place: `levels` and what they stand for,
    `visited` [N, Kp], and `scales` [N, Kp / block_size] are in the order of visits, and so are `zeros`, which stay.
    Each stride of columns is visited so many `times`."""
    on, workers = device_of(white), threads()
    on.subtract_product(white, visited, upper)
    shares = [slice(k * len(levels) // workers, (k + 1) * len(levels) // workers) for k in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        for some in [*strides] * times:
            rows = upper[some, some.start :]
            left = on.to_host(on.contiguous(on.product(white[:, some.start :], rows.T)))
            own = on.to_host(on.contiguous(on.square(rows.T)))
            values, moved = on.to_host(visited[:, some]).copy(), np.zeros_like(left)
            blocks = slice(some.start // spec.block_size, some.stop // spec.block_size)
            done = [
                pool.submit(
                    _revisit_columns,
                    left[share],
                    own,
                    spec.bits,
                    spec.block_size,
                    spec.short_scales,
                    levels[share, some],
                    values[share],
                    scales[share, blocks],
                    zeros[share, blocks],
                    moved[share],
                )
                for share in shares
            ]
            for future in done:
                future.result()
            visited[:, some] = on.from_host(values)
            on.subtract_product(white[:, some.start :], on.from_host(moved), rows)


@compiled
def _revisit_columns(
    left: Any,
    own: Any,
    bits: int,
    block_size: int,
    short_scales: bool,
    levels: Any,
    values: Any,
    scales: Any,
    zeros: Any,
    moved: Any,
) -> None:
    """Visits the columns of `left` [N, n] again: `own` [n, n] is their part of H. Changes `levels`, the `values` they
    stand for and `scales` [N, n / block_size]; fills `moved` with how far each value went."""
    top, count = _F((1 << bits) - 1), left.shape[1]
    steps, along = np.empty(block_size, np.float32), np.empty(block_size, np.float32)
    for row in range(left.shape[0]):
        for j in range(scales.shape[1]):
            first, zero = j * block_size, _F(zeros[row, j])
            for i in range(block_size):
                steps[i] = _F(levels[row, first + i]) - zero
            scale = scales[row, j]
            fitted = _refitted(scale, steps, left[row, first : first + block_size], own, first, along)
            fitted = nearest_bfloat16(fitted) if short_scales else fitted
            if fitted != scale:
                for i in range(block_size):
                    moved[row, first + i] += (fitted - scale) * steps[i]
                    values[row, first + i] = fitted * steps[i]
                    for k in range(count):
                        left[row, k] -= (fitted - scale) * steps[i] * own[first + i, k]
                scales[row, j] = scale = fitted
            if scale == _F(0):
                continue
            for i in range(first, first + block_size):
                level = np.rint((values[row, i] + left[row, i] / own[i, i]) / scale) + zero
                level = _F(0) if level < _F(0) else level
                level = top if level > top else level
                step = (level - zero) * scale - values[row, i]
                if level != _F(levels[row, i]):
                    levels[row, i] = np.uint8(np.int32(level))
                    values[row, i] = (level - zero) * scale
                    moved[row, i] += step
                    for k in range(count):
                        left[row, k] -= step * own[i, k]


@compiled
def _refitted(scale: Any, steps: Any, left: Any, own: Any, first: int, along: Any) -> Any:
    """The scale of a block that suits its integers less their zero point, `steps`, best; the old one where they say
    nothing, or something else altogether. `along` [block_size] is room to work in."""
    slope, curvature = _F(0), _F(0)
    for i in range(steps.size):
        along[i] = _F(0)
    for i in range(steps.size):
        take_share(along, -steps[i], own[first + i, first : first + steps.size])
    for i in range(steps.size):
        slope += steps[i] * left[i]
        curvature += steps[i] * along[i]
    if not curvature > _F(0) or scale == _F(0):
        return scale
    fitted = scale + slope / curvature
    ratio = fitted / scale
    return fitted if ratio * FURTHEST > _F(1) and ratio < FURTHEST else scale
