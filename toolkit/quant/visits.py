"""Columns of a matrix rounded in an order of visits, whatever says what is left of each: GPTQ's loop.

A block of MatMulNBits is visited whole, so that no g_idx is needed; each block's scale is searched on its columns when
its turn comes. Scales of `signed` specs stand before the first column is rounded, searched on the target as it comes:
those of a row depend on each other. Then the order is free, whatever the blocks.
What is left of columns comes from a device's products; the columns themselves are rounded by compiled loops on the
host, or on the device where that is faster (quant/device_columns.py).
N output features, K input features, Kp = K padded to whole blocks, J blocks a row.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit.device.arrays import device_of
from toolkit.machine import threads
from toolkit.quant import kernel, signed_kernel
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, pack_last_axis, quantize_blocks, weights_of_errors
from toolkit.quant.device_columns import RoundedColumns, searched_columns, signed_columns
from toolkit.quant.revisit import revisit

Floats = NDArray[np.float32]
# Columns between two products with all that came before: wide enough for a matrix product to pay.
_STRIDE: Final = 128
# Rows that are compared at once: what they differ by is no memory that the system has to clear first.
_COMPARED_ROWS: Final = 1024


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


def round_in_order(
    weight: Floats, target: Floats, columns: Columns, order: Visits, spec: QuantSpec, revisits: int = 0
) -> Solved:
    """`weight` [N, K] rounded column after column, and again as often as `revisits` says where scales are searched;
    scales that stand beforehand are searched on `target` [N, K]. The `noise` of the blocks is the plain sum of squared
    errors against the weight."""
    on, (N, K), padded = device_of(weight), weight.shape, order.order.size
    rounding: _SearchedScales | _StandingScales
    rounding = _StandingScales(on.to_host(target), order, spec) if spec.signed else _SearchedScales(N, K, order, spec)
    levels, visited = np.empty((N, padded), np.uint8), on.empty((N, padded))
    with ThreadPoolExecutor(threads()) as pool:
        for some in order.strides(spec):
            left, triangle = columns.left(some, visited[:, : some.start])
            if on.rounds_columns:
                made = rounding.round_on_device(some, left, triangle)
                found, values = on.to_host(made.levels).astype(np.uint8), made.restored
            else:
                found, rounded = _round_on_host(pool, rounding, some, on.to_host(left), on.to_host(triangle))
                values = on.from_host(rounded)
            levels[:, some], visited[:, some] = found, values
    if revisits and isinstance(rounding, _SearchedScales) and (whole := columns.whole()):
        rounding.revisit(*whole, levels, visited, revisits)
    places = np.argsort(order.order)
    inside = on.index(places[:K])
    restored = on.contiguous(on.by_rows(lambda rows: rows[:, inside], visited))
    in_place = np.take(levels, places, axis=1)
    compared = (slice(start, start + _COMPARED_ROWS) for start in range(0, N, _COMPARED_ROWS))
    noise = sum(on.square_sum(restored[some] - weight[some]) for some in compared)
    return Solved(_assembled(in_place, rounding, spec, noise), restored)


def _round_on_host(
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

    def __init__(self, rows: int, channels: int, order: Visits, spec: QuantSpec) -> None:
        shape = (rows, spec.num_blocks(channels))
        self.scales, self.zeros = np.empty(shape, np.float32), np.empty(shape, np.uint8)
        self._order, self._spec, self._heard = order.order, spec, order.diagonal[order.order] > 0

    def round(
        self, rows: slice, some: slice, left: Floats, triangle: Floats, levels: NDArray[np.uint8], restored: Floats
    ) -> None:
        """Some rows of some columns, as `kernel.gptq_columns`."""
        spec, worth = self._spec, _worth(triangle, self._heard[some])
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
        strides = visit_strides(order.size, spec.block_size)
        revisit(white, upper, strides, spec, levels, visited, scales, zeros, revisits)
        self.scales[:, blocks] = scales

    def round_on_device(self, some: slice, left: Floats, triangle: Floats) -> RoundedColumns:
        """Rounds all rows of some columns where they are."""
        spec, worth = self._spec, _worth(device_of(triangle).to_host(triangle), self._heard[some])
        blocks = self._order[some][:: spec.block_size] // spec.block_size
        made = searched_columns(left, triangle, worth, spec)
        self.scales[:, blocks], self.zeros[:, blocks] = made.scales, made.zeros
        return made


def _worth(triangle: Floats, heard: NDArray[np.bool_]) -> Floats:
    """What an error of a column is worth in the search of its block's scale, [n]: U_kk^2, which is what remains of it
    once the columns behind have made up for it as far as they can, and nothing where the text left a column silent."""
    return weights_of_errors(np.where(heard, np.square(np.diagonal(triangle)), 0).astype(np.float32))


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

    def round_on_device(self, some: slice, left: Floats, triangle: Floats) -> RoundedColumns:
        """Rounds all rows of some columns where they are."""
        blocks = self._order[some] // self._spec.block_size
        return signed_columns(left, triangle, np.ascontiguousarray(self.scales[:, blocks]), self._spec.bits)


def _assembled(
    levels: NDArray[np.uint8], rounding: _SearchedScales | _StandingScales, spec: QuantSpec, noise: float
) -> QuantizedBlocks:
    N, J = rounding.scales.shape
    beyond = J * spec.block_size - levels.shape[1]
    levels = np.pad(levels, ((0, 0), (0, beyond)), constant_values=1 << (spec.bits - 1))
    zero_points = None if spec.symmetric else pack_last_axis(rounding.zeros, spec.bits)
    packed = pack_last_axis(levels.reshape(N, J, spec.block_size), spec.bits)
    return QuantizedBlocks(packed, rounding.scales, zero_points, noise)
