"""GPTQ: columns rounded one after the other, each error made up for by the columns that follow.

Minimizes tr((W - Q) H (W - Q)'), the squared error of the output, for the second moment H = X'X / T of the input
(arXiv 2210.17323). Blocks of MatMulNBits are visited by their largest diag(H), columns within a block by
their own, so the order of activations counts and no g_idx is needed. Each block's scale is searched on its columns as
the errors before it left them, weighed by diag(H).

With H = U U', U upper in the order of visits, the loss of a row is the sum over columns k of
(z_k - sum_(j<=k) q_j U_jk)^2 with z = w U, so column k is best rounded from (z_k - sum_(j<k) q_j U_jk) / U_kk (arXiv
2307.13304, theorem 6: the same integers as GPTQ's, without the inverse of H). U takes K^3 / 6 multiplications, H^-1 and
its factor more than K^3.

Scales of `signed` specs stand before the first column is rounded, searched on the target as it comes: those of a row
depend on each other. Then the order is free, whatever the blocks.

If the input is X~ by the time it arrives, because layers before are quantized already, the target that makes up for
that is W X'X~ (X~'X~)^-1 (Qronos, arXiv 2505.11695, in closed form), and z = W X'X~ U'^-1: half of that inverse.
N output features, K input features, Kp = K padded to whole blocks, J blocks a row.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.quant import kernel, signed_kernel
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, pack_last_axis, quantize_blocks, weights_of_errors

Floats = NDArray[np.float32]
DAMPING: Final = 0.05
_DAMPINGS: Final = (DAMPING, 4 * DAMPING, 20 * DAMPING)
# Columns between two products with all that came before: wide enough for a matrix product to pay.
_STRIDE: Final = 128
# Columns whose triangle is factorized and inverted in float64 at once.
_LEAF: Final = 256


class NotPositiveDefiniteError(ValueError):
    """A second moment that no damping makes positive definite."""


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of an input: U [Kp, Kp] upper in the order of visits with U U' = H damped, the inverses of its
    triangles on the diagonal, _LEAF columns each, that order [Kp], and diag(H) [Kp] as given. Damped, H is `kept` times
    itself plus `added` [Kp] on its diagonal."""

    upper: Floats
    leaves: tuple[Floats, ...]
    order: NDArray[np.int64]
    diagonal: Floats
    kept: np.float32
    added: Floats


@dataclass(frozen=True)
class Solved:
    """A solved matrix: its blocks, in the layout of `quantize_blocks`, and the float32 [N, K] they stand for."""

    blocks: QuantizedBlocks
    restored: Floats


def factorize(moment: Floats, block_size: int, tokens: float = math.inf) -> Factor:
    """The factor of H [K, K], a mean over `tokens`, for blocks of `block_size`. Channels that are always zero keep
    their weights.

    What K channels have in common on T tokens is partly the text's accident, the more so the fewer tokens there are:
    all but the diagonal is taken by T / (K + T) (the shape of Ledoit and Wolf's shrinkage; measured in LOG.md).
    Raises NotPositiveDefiniteError if even a damping of the mean of the diagonal will not do.
    """
    K = moment.shape[0]
    padded = -(-K // block_size) * block_size
    diagonal = np.zeros(padded, np.float32)
    diagonal[:K] = np.diagonal(moment)
    order = _visits(diagonal, block_size)
    mean = float(diagonal[:K].mean(dtype=np.float64))
    if not (np.isfinite(mean) and mean > 0):
        raise NotPositiveDefiniteError(f"the mean second moment of the input is {mean}")
    inside = np.flatnonzero(order < K)
    kept = np.float32(1 / (1 + K / tokens))
    for damping in _DAMPINGS:
        added = ((1 - kept) * diagonal + np.where(diagonal > 0, damping * mean, mean)).astype(np.float32)
        damped = np.zeros((padded, padded), np.float32)
        damped[np.ix_(inside, inside)] = moment[np.ix_(order[inside], order[inside])]
        damped *= kept
        damped[np.arange(padded), np.arange(padded)] += added[order]
        try:
            leaves = _factor_in_place(damped)
        except np.linalg.LinAlgError:
            continue
        if np.isfinite(damped).all():
            return Factor(damped, leaves, order, diagonal, kept, added)
    raise NotPositiveDefiniteError("the second moment of the input is not positive definite")


def corrected_target(weight: Floats, product: Floats, factor: Factor) -> Floats:
    """W' = W C H^-1 [N, K] from `product` = W C [N, K] with C = X'X~ / T, damped alike, so that without an error before
    it W stays W."""
    target = np.empty((weight.shape[0], factor.order.size), np.float32)
    target[:, factor.order] = _divided_by_upper(_whitened(weight, product, factor), factor)
    return np.ascontiguousarray(target[:, : weight.shape[1]])


def gptq_blocks(weight: Floats, factor: Factor, spec: QuantSpec, product: Floats | None = None) -> Solved:
    """`weight` [N, K] solved; `product` is W C [N, K] with C = X'X~ / T where the input arrives changed. The `noise` of
    the blocks is the plain sum of squared errors against the weight."""
    N, K = weight.shape
    padded, J = factor.order.size, spec.num_blocks(K)
    white = _whitened(weight, product, factor)
    rounding: _SearchedScales | _StandingScales
    if spec.signed:
        target = weight if product is None else corrected_target(weight, product, factor)
        rounding = _StandingScales(target, factor, spec)
    else:
        rounding = _SearchedScales(N, J, factor, spec)
    levels, visited = np.empty((N, padded), np.uint8), np.empty((N, padded), np.float32)
    stride = _STRIDE if spec.signed else max(_STRIDE, spec.block_size)
    workers = os.cpu_count() or 1
    slices = [slice(k * N // workers, (k + 1) * N // workers) for k in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, padded, stride):
            stop = min(start + stride, padded)
            triangle = np.ascontiguousarray(factor.upper[start:stop, start:stop])
            columns = np.ascontiguousarray(white[:, start:stop])
            if start:
                columns -= visited[:, :start] @ factor.upper[:start, start:stop]
            made, restored = np.empty(columns.shape, np.uint8), np.empty_like(columns)
            done = [pool.submit(rounding.round, s, start, columns[s], triangle, made[s], restored[s]) for s in slices]
            for future in done:
                future.result()
            levels[:, factor.order[start:stop]], visited[:, start:stop] = made, restored
    restored = np.empty_like(visited)
    restored[:, factor.order] = visited
    restored = np.ascontiguousarray(restored[:, :K])
    return Solved(_assembled(levels, rounding.scales, rounding.zeros, spec, _noise(restored, weight)), restored)


class _SearchedScales:
    """Each block's scale and zero point, searched when its turn comes."""

    def __init__(self, rows: int, blocks: int, factor: Factor, spec: QuantSpec) -> None:
        self.scales, self.zeros = np.empty((rows, blocks), np.float32), np.empty((rows, blocks), np.uint8)
        self._worth, self._order, self._spec = weights_of_errors(factor.diagonal)[factor.order], factor.order, spec

    def round(
        self, rows: slice, start: int, columns: Floats, triangle: Floats, levels: NDArray[np.uint8], restored: Floats
    ) -> None:
        """Some rows of the columns from `start` on, as `kernel.gptq_columns`."""
        spec, stop = self._spec, start + columns.shape[1]
        blocks = self._order[start : stop : spec.block_size] // spec.block_size
        scales, zeros = (np.empty((columns.shape[0], blocks.size), kind) for kind in (np.float32, np.uint8))
        worth = self._worth[start:stop]
        kernel.gptq_columns(
            columns, triangle, worth, spec.bits, spec.symmetric, spec.block_size, levels, restored, scales, zeros
        )
        self.scales[rows, blocks], self.zeros[rows, blocks] = scales, zeros


class _StandingScales:
    """A signed spec's scales, searched beforehand."""

    def __init__(self, target: Floats, factor: Factor, spec: QuantSpec) -> None:
        searched = quantize_blocks(target, spec, factor.diagonal[: target.shape[1]])
        self.scales, self._order, self._spec = searched.scales, factor.order, spec
        self.zeros = np.full(self.scales.shape, 1 << (spec.bits - 1), np.uint8)

    def round(
        self, rows: slice, start: int, columns: Floats, triangle: Floats, levels: NDArray[np.uint8], restored: Floats
    ) -> None:
        """Some rows of the columns from `start` on, as `signed_kernel.round_signed_columns`."""
        blocks = self._order[start : start + columns.shape[1]] // self._spec.block_size
        scales = np.ascontiguousarray(self.scales[rows][:, blocks])
        signed_kernel.round_signed_columns(columns, triangle, scales, self._spec.bits, levels, restored)


def _assembled(
    levels: NDArray[np.uint8], scales: Floats, zeros: NDArray[np.uint8], spec: QuantSpec, noise: float
) -> QuantizedBlocks:
    N, J = scales.shape
    beyond = J * spec.block_size - levels.shape[1]
    levels = np.pad(levels, ((0, 0), (0, beyond)), constant_values=1 << (spec.bits - 1))
    zero_points = None if spec.symmetric else pack_last_axis(zeros, spec.bits)
    packed = pack_last_axis(levels.reshape(N, J, spec.block_size), spec.bits)
    return QuantizedBlocks(packed, scales, zero_points, noise)


def _noise(restored: Floats, weight: Floats) -> float:
    miss = (restored - weight).reshape(-1)
    return float(np.vdot(miss, miss))


def _visits(diagonal: Floats, block_size: int) -> NDArray[np.int64]:
    """Columns in the order they are rounded: a block's together, by falling diag(H)."""
    blocks = diagonal.reshape(-1, block_size)
    first = np.argsort(-blocks.max(axis=1), kind="stable")
    within = np.argsort(-blocks, axis=1, kind="stable")
    return np.asarray((first[:, None] * block_size + within[first]).reshape(-1), np.int64)


def _factor_in_place(matrix: Floats) -> tuple[Floats, ...]:
    """Replaces H by U upper with U U' = H, from the last _LEAF columns to the first, and returns the inverses of the
    triangles on its diagonal, first one first.

    All but the leaves is products in float32; `numpy.linalg.cholesky` of the whole works on float64 copies. Raises
    LinAlgError if the matrix is not positive definite.
    """
    leaves: list[Floats] = []
    for leaf in reversed(_leaves(matrix.shape[0])):
        above = slice(0, leaf.stop)
        if leaf.stop < matrix.shape[0]:
            matrix[above, leaf] -= matrix[above, leaf.stop :] @ matrix[leaf, leaf.stop :].T
        backwards = np.linalg.cholesky(matrix[leaf, leaf][::-1, ::-1].astype(np.float64))
        inverse = np.tril(np.linalg.inv(backwards))[::-1, ::-1].astype(np.float32)
        matrix[leaf, leaf] = backwards[::-1, ::-1]
        matrix[leaf.stop :, leaf] = 0
        matrix[: leaf.start, leaf] = matrix[: leaf.start, leaf] @ inverse.T
        leaves.append(inverse)
    return tuple(reversed(leaves))


def _whitened(weight: Floats, product: Floats | None, factor: Factor) -> Floats:
    """z [N, Kp] in the order of visits: W U, or W C U'^-1 with C damped as H is."""
    N, K = weight.shape
    given = np.zeros((N, factor.order.size), np.float32)
    if product is None:
        given[:, :K] = weight
        return np.asarray(given[:, factor.order] @ factor.upper, np.float32)
    given[:, :K] = factor.kept * product + weight * factor.added[:K]
    given = given[:, factor.order]
    for leaf, inverse in zip(reversed(_leaves(given.shape[1])), reversed(factor.leaves), strict=True):
        left = given[:, leaf] - given[:, leaf.stop :] @ factor.upper[leaf, leaf.stop :].T
        given[:, leaf] = left @ inverse.T
    return given


def _divided_by_upper(white: Floats, factor: Factor) -> Floats:
    """z U^-1 [N, Kp]."""
    target = np.empty_like(white)
    for leaf, inverse in zip(_leaves(white.shape[1]), factor.leaves, strict=True):
        left = white[:, leaf] - target[:, : leaf.start] @ factor.upper[: leaf.start, leaf]
        target[:, leaf] = left @ inverse
    return target


def _leaves(columns: int) -> list[slice]:
    return [slice(start, min(start + _LEAF, columns)) for start in range(0, columns, _LEAF)]
