"""GPTQ: columns rounded one after the other, each error made up for by the columns that follow.

Minimizes tr((W - Q) H (W - Q)'), the squared error of the output, for the second moment H = X'X / T of the input
(arXiv 2210.17323, algorithm 1). Blocks of MatMulNBits are visited by their largest diag(H), columns within a block by
their own, so the order of activations counts and no g_idx is needed. Each block's scale is searched on its columns as
the errors before it left them, weighed by diag(H).

With U upper and U'U = H^-1, column i passes (w_i - q_i) / U_ii * U_ij on to column j. With H in reverse order and
H = L L', U is L^-1 in reverse order.

Scales of `signed` specs stand before the first column is rounded, searched on the target as it comes: those of a row
depend on each other. Then the order is free, whatever the blocks.

If the input is X~ by the time it arrives, because layers before are quantized already, the target that makes up for
that is W X'X~ (X~'X~)^-1 (Qronos, arXiv 2505.11695, in closed form).
N output features, K input features, Kp = K padded to whole blocks, J blocks a row.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.quant import kernel, signed_kernel
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, pack_last_axis, quantize_blocks, weights_of_errors

Floats = NDArray[np.float32]
DAMPING: Final = 0.01
_DAMPINGS: Final = (DAMPING, 10 * DAMPING, 100 * DAMPING)
# Columns between two updates of all that follow: wide enough for a matrix product to pay.
_STRIDE: Final = 128
_LEAF: Final = 256


class NotPositiveDefiniteError(ValueError):
    """A second moment that no damping makes positive definite."""


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of an input: U [Kp, Kp] upper in the order of visits, that order [Kp], diag(H) [Kp] as given, and
    the damping that was needed, as a share of its mean."""

    upper: Floats
    order: NDArray[np.int64]
    diagonal: Floats
    damping: float


def factorize(moment: Floats, block_size: int) -> Factor:
    """The factor of H [K, K] for blocks of `block_size`. Channels that are always zero keep their weights.

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
    backwards = order[::-1]
    for damping in _DAMPINGS:
        damped = np.zeros((padded, padded), np.float32)
        inside = np.flatnonzero(backwards < K)
        damped[np.ix_(inside, inside)] = moment[np.ix_(backwards[inside], backwards[inside])]
        silent = diagonal[backwards] <= 0
        damped[np.arange(padded), np.arange(padded)] += np.where(silent, mean, damping * mean).astype(np.float32)
        try:
            inverse = _inverse_of_factor(damped)
        except np.linalg.LinAlgError:
            continue
        if np.isfinite(inverse).all():
            return Factor(inverse[::-1, ::-1], order, diagonal, damping)
    raise NotPositiveDefiniteError("the second moment of the input is not positive definite")


def corrected_target(weight: Floats, product: Floats, factor: Factor) -> Floats:
    """W' = W C H^-1 [N, K] from `product` = W C [N, K] with C = X'X~ / T, damped alike, so that without an error before
    it W stays W."""
    K = weight.shape[1]
    mean = float(factor.diagonal[:K].mean(dtype=np.float64))
    damping = np.where(factor.diagonal[:K] > 0, factor.damping * mean, mean).astype(np.float32)
    moved = np.zeros((weight.shape[0], factor.order.size), np.float32)
    moved[:, :K] = product + weight * damping
    moved = np.ascontiguousarray(moved[:, factor.order])
    moved = np.asarray((moved @ factor.upper.T) @ factor.upper, np.float32)
    target = np.empty_like(moved)
    target[:, factor.order] = moved
    return np.ascontiguousarray(target[:, :K])


def gptq_blocks(weight: Floats, factor: Factor, spec: QuantSpec) -> QuantizedBlocks:
    """`weight` [N, K] in the layout of `quantize_blocks`; `noise` is the plain sum of squared errors against it."""
    N, K = weight.shape
    padded, J = factor.order.size, spec.num_blocks(K)
    left = np.zeros((N, padded), np.float32)
    left[:, :K] = weight
    left = left[:, factor.order]
    rounding = _StandingScales(weight, factor, spec) if spec.signed else _SearchedScales(N, J, factor, spec)
    levels = np.empty((N, padded), np.uint8)
    stride = _STRIDE if spec.signed else max(_STRIDE, spec.block_size)
    workers = os.cpu_count() or 1
    slices = [slice(k * N // workers, (k + 1) * N // workers) for k in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, padded, stride):
            stop = min(start + stride, padded)
            triangle = np.ascontiguousarray(factor.upper[start:stop, start:stop])
            columns = np.ascontiguousarray(left[:, start:stop])
            made, errors = np.empty(columns.shape, np.uint8), np.empty_like(columns)
            done = [pool.submit(rounding.round, s, start, columns[s], triangle, made[s], errors[s]) for s in slices]
            for future in done:
                future.result()
            levels[:, factor.order[start:stop]] = made
            if stop < padded:
                left[:, stop:] -= errors @ factor.upper[start:stop, stop:]
    return _assembled(weight, levels, rounding.scales, rounding.zeros, spec)


class _SearchedScales:
    """Each block's scale and zero point, searched when its turn comes."""

    def __init__(self, rows: int, blocks: int, factor: Factor, spec: QuantSpec) -> None:
        self.scales, self.zeros = np.empty((rows, blocks), np.float32), np.empty((rows, blocks), np.uint8)
        self._worth, self._order, self._spec = weights_of_errors(factor.diagonal)[factor.order], factor.order, spec

    def round(
        self, rows: slice, start: int, columns: Floats, triangle: Floats, levels: NDArray[np.uint8], errors: Floats
    ) -> None:
        """Some rows of the columns from `start` on, as `kernel.gptq_columns`."""
        spec, stop = self._spec, start + columns.shape[1]
        blocks = self._order[start : stop : spec.block_size] // spec.block_size
        scales, zeros = (np.empty((columns.shape[0], blocks.size), kind) for kind in (np.float32, np.uint8))
        kernel.gptq_columns(
            columns,
            triangle,
            self._worth[start:stop],
            spec.bits,
            spec.symmetric,
            spec.block_size,
            levels,
            errors,
            scales,
            zeros,
        )
        self.scales[rows, blocks], self.zeros[rows, blocks] = scales, zeros


class _StandingScales:
    """A signed spec's scales, searched beforehand."""

    def __init__(self, weight: Floats, factor: Factor, spec: QuantSpec) -> None:
        searched = quantize_blocks(weight, spec, factor.diagonal[: weight.shape[1]])
        self.scales, self._order, self._spec = searched.scales, factor.order, spec
        self.zeros = np.full(self.scales.shape, 1 << (spec.bits - 1), np.uint8)

    def round(
        self, rows: slice, start: int, columns: Floats, triangle: Floats, levels: NDArray[np.uint8], errors: Floats
    ) -> None:
        """Some rows of the columns from `start` on, as `signed_kernel.round_signed_columns`."""
        blocks = self._order[start : start + columns.shape[1]] // self._spec.block_size
        scales = np.ascontiguousarray(self.scales[rows][:, blocks])
        signed_kernel.round_signed_columns(columns, triangle, scales, self._spec.bits, levels, errors)


def _assembled(
    weight: Floats, levels: NDArray[np.uint8], scales: Floats, zeros: NDArray[np.uint8], spec: QuantSpec
) -> QuantizedBlocks:
    (N, K), J = weight.shape, scales.shape[1]
    beyond = J * spec.block_size - levels.shape[1]
    levels = np.pad(levels, ((0, 0), (0, beyond)), constant_values=1 << (spec.bits - 1))
    blocks = levels.reshape(N, J, spec.block_size)
    noise = 0.0
    for row in range(N):
        steps = blocks[row].astype(np.float32) - zeros[row][:, None]
        miss = (steps * scales[row][:, None]).reshape(-1)[:K] - weight[row]
        noise += float(np.vdot(miss, miss))
    zero_points = None if spec.symmetric else pack_last_axis(zeros, spec.bits)
    return QuantizedBlocks(pack_last_axis(blocks, spec.bits), scales, zero_points, noise)


def _visits(diagonal: Floats, block_size: int) -> NDArray[np.int64]:
    """Columns in the order they are rounded: a block's together, by falling diag(H)."""
    blocks = diagonal.reshape(-1, block_size)
    first = np.argsort(-blocks.max(axis=1), kind="stable")
    within = np.argsort(-blocks, axis=1, kind="stable")
    return np.asarray((first[:, None] * block_size + within[first]).reshape(-1), np.int64)


def _inverse_of_factor(matrix: Floats) -> Floats:
    """L^-1 [n, n] for L L' = `matrix`, in float32 but for the leaves: by halves, so that nearly all of it is products.

    With L = [[A, 0], [B, C]] it is [[A^-1, 0], [-C^-1 B A^-1, C^-1]], and C is the factor of what B leaves. Raises
    LinAlgError if the matrix is not positive definite. `numpy.linalg.cholesky` works on float64 copies.
    """
    n = matrix.shape[0]
    if n <= _LEAF:
        lower = np.linalg.cholesky(matrix.astype(np.float64))
        return np.asarray(np.tril(np.linalg.inv(lower)), np.float32)
    half = n // 2
    inverse = np.zeros_like(matrix)
    inverse[:half, :half] = _inverse_of_factor(matrix[:half, :half])
    below = matrix[half:, :half] @ inverse[:half, :half].T
    inverse[half:, half:] = _inverse_of_factor(matrix[half:, half:] - below @ below.T)
    inverse[half:, :half] = -inverse[half:, half:] @ (below @ inverse[:half, :half])
    return inverse
