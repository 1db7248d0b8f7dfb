"""Columns of a matrix rounded in an order of visits, whatever says what is left of each: GPTQ's loop.

Each block's scale is searched on its columns when its turn comes. Scales of `signed` specs stand before the first
column is rounded, searched on the target as it comes: those of a row depend on each other. Then the order is free,
whatever the blocks. What is left of columns comes from a device's products; the columns themselves are rounded by
compiled loops on the host, or on the device where that is faster (quant/device_visits.py).
N output features, K input features, Kp = K padded to whole blocks, J blocks a row.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.device.arrays import device_of
from toolkit.machine import threads
from toolkit.quant import kernel, signed_kernel
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, pack_last_axis, quantize_blocks
from toolkit.quant.device_visits import round_on_device
from toolkit.quant.revisit import revisit
from toolkit.quant.visits import Columns, Solved, Visits, worth_of_errors

Floats = NDArray[np.float32]
# Rows that are compared at once: what they differ by is no memory that the system has to clear first.
_COMPARED_ROWS: Final = 1024


def round_in_order(
    weight: Floats, target: Floats, columns: Columns, order: Visits, spec: QuantSpec, revisits: int = 0
) -> Solved:
    """`weight` [N, K] rounded column after column, and again as often as `revisits` says where scales are searched;
    scales that stand beforehand are searched on `target` [N, K]. The `noise` of the blocks is the plain sum of squared
    errors against the weight."""
    on = device_of(weight)
    if not on.rounds_columns:
        return _round_on_host(weight, target, columns, order, spec, revisits)
    standing = _StandingScales(on.to_host(target), order, spec).scales if spec.signed else None
    made = round_on_device(weight, columns, order, spec, revisits, standing)
    return Solved(QuantizedBlocks(made.packed, made.scales, made.zeros, _noise(weight, made.restored)), made.restored)


def _round_on_host(
    weight: Floats, target: Floats, columns: Columns, order: Visits, spec: QuantSpec, revisits: int
) -> Solved:
    on, (N, K), padded = device_of(weight), weight.shape, order.order.size
    rounding: _SearchedScales | _StandingScales
    rounding = _StandingScales(on.to_host(target), order, spec) if spec.signed else _SearchedScales(N, order, spec)
    levels, visited = np.empty((N, padded), np.uint8), on.empty((N, padded))
    with ThreadPoolExecutor(threads()) as pool:
        for some in order.strides(spec):
            left, triangle = columns.left(some, visited[:, : some.start])
            found, rounded = _by_cores(pool, rounding, some, on.to_host(left), on.to_host(triangle))
            levels[:, some], visited[:, some] = found, on.from_host(rounded)
    if revisits and isinstance(rounding, _SearchedScales) and (whole := columns.whole()):
        rounding.revisit(*whole, levels, visited, revisits)
    places = np.argsort(order.order)
    inside = on.index(places[:K])
    restored = on.contiguous(on.by_rows(lambda rows: rows[:, inside], visited))
    in_place = np.take(levels, places, axis=1)
    return Solved(_assembled(in_place, rounding, spec, K, _noise(weight, restored)), restored)


def _noise(weight: Floats, restored: Floats) -> float:
    """The plain sum of squared errors."""
    on = device_of(weight)
    compared = (slice(start, start + _COMPARED_ROWS) for start in range(0, weight.shape[0], _COMPARED_ROWS))
    return sum(on.square_sum(restored[some] - weight[some]) for some in compared)


def _by_cores(
    pool: ThreadPoolExecutor, rounding: _SearchedScales | _StandingScales, some: slice, left: Floats, triangle: Floats
) -> tuple[NDArray[np.uint8], Floats]:
    """Levels and what they stand for of some columns, their rows by as many cores as there are."""
    rows, workers = left.shape[0], threads()
    slices = [slice(k * rows // workers, (k + 1) * rows // workers) for k in range(workers)]
    made, values = np.empty(left.shape, np.uint8), np.empty_like(left)
    done = [pool.submit(rounding.round, s, some, left[s], triangle, made[s], values[s]) for s in slices]
    for future in done:
        future.result()
    return made, values


class _SearchedScales:
    """Each block's scale and zero point, searched when its turn comes."""

    def __init__(self, rows: int, order: Visits, spec: QuantSpec) -> None:
        shape = (rows, order.order.size // spec.block_size)
        self.scales, self.zeros = np.empty(shape, np.float32), np.empty(shape, np.uint8)
        self._visits, self._order, self._spec = order, order.order, spec
        self._heard = order.diagonal[order.order] > 0

    def round(
        self, rows: slice, some: slice, left: Floats, triangle: Floats, levels: NDArray[np.uint8], restored: Floats
    ) -> None:
        """Some rows of some columns, as `kernel.gptq_columns`."""
        spec, worth = self._spec, worth_of_errors(triangle.diagonal(), self._heard[some])
        blocks = self._order[some][:: spec.block_size] // spec.block_size
        scales, zeros = (np.empty((left.shape[0], blocks.size), kind) for kind in (np.float32, np.uint8))
        kernel.gptq_columns(
            left,
            triangle,
            worth,
            spec.bits,
            spec.symmetric,
            spec.block_size,
            spec.short_scales,
            levels,
            restored,
            scales,
            zeros,
        )
        self.scales[rows, blocks], self.zeros[rows, blocks] = scales, zeros

    def revisit(self, white: Floats, upper: Floats, levels: NDArray[np.uint8], visited: Floats, revisits: int) -> None:
        """Visits all columns again so many times, as `quant/revisit.py`."""
        spec, order = self._spec, self._order
        blocks = order[:: spec.block_size] // spec.block_size
        scales, zeros = np.ascontiguousarray(self.scales[:, blocks]), np.ascontiguousarray(self.zeros[:, blocks])
        revisit(white, upper, self._visits.strides(spec), spec, levels, visited, scales, zeros, revisits)
        self.scales[:, blocks] = scales


class _StandingScales:
    """A signed spec's scales, searched beforehand."""

    def __init__(self, target: Floats, order: Visits, spec: QuantSpec) -> None:
        searched = quantize_blocks(target, spec, order.diagonal[: target.shape[1]])
        self.scales, self._order, self._spec = searched.scales, order.order, spec
        self.zeros = np.full(self.scales.shape, 1 << (spec.bits - 1), np.uint8)

    def round(
        self, rows: slice, some: slice, left: Floats, triangle: Floats, levels: NDArray[np.uint8], restored: Floats
    ) -> None:
        """Some rows of some columns, as `signed_kernel.round_signed_columns`."""
        blocks = self._order[some] // self._spec.block_size
        scales = np.ascontiguousarray(self.scales[rows][:, blocks])
        signed_kernel.round_signed_columns(left, triangle, scales, self._spec.bits, levels, restored)


def _assembled(
    levels: NDArray[np.uint8], rounding: _SearchedScales | _StandingScales, spec: QuantSpec, channels: int, noise: float
) -> QuantizedBlocks:
    N, J = levels.shape[0], spec.num_blocks(channels)
    # Wider blocks of another matrix may have more columns than these fill, and signed ones less.
    levels = levels[:, : J * spec.block_size]
    beyond = J * spec.block_size - levels.shape[1]
    levels = np.pad(levels, ((0, 0), (0, beyond)), constant_values=1 << (spec.bits - 1))
    zero_points = None if spec.symmetric else pack_last_axis(rounding.zeros[:, :J], spec.bits)
    packed = pack_last_axis(levels.reshape(N, J, spec.block_size), spec.bits)
    return QuantizedBlocks(packed, np.ascontiguousarray(rounding.scales[:, :J]), zero_points, noise)
