"""GPTQ: columns rounded one after the other, each error made up for by the columns that follow.

Minimizes tr((W - Q) H (W - Q)'), the squared error of the output, for the second moment H = X'X / T of the input
(arXiv 2210.17323). Blocks of MatMulNBits are visited by their largest diag(H), columns within a block by
their own, so the order of activations counts and no g_idx is needed. Each block's scale is searched on its columns as
the errors before it left them, weighed by what the columns behind cannot make up for.

With H = U U', U upper in the order of visits, the loss of a row is the sum over columns k of
(z_k - sum_(j<=k) q_j U_jk)^2 with z = w U, so column k is best rounded from (z_k - sum_(j<k) q_j U_jk) / U_kk (arXiv
2307.13304, theorem 6: the same integers as GPTQ's, without the inverse of H). U takes K^3 / 6 multiplications, H^-1 and
its factor more than K^3.

The loop itself is quant/in_order.py.

If the input is X~ by the time it arrives, because layers before are quantized already, the target that makes up for
that is W X'X~ (X~'X~)^-1 (Qronos, arXiv 2505.11695, in closed form), and z = W X'X~ U'^-1: half of that inverse. Of
more rows than there are columns z is one product with X'X~ U'^-1, their `whitening`.
Products are a device's; triangles of _LEAF columns are factorized in float64.
N output features, K input features, Kp = K padded to whole blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.device.arrays import device_of
from toolkit.quant.blockwise import QuantSpec
from toolkit.quant.in_order import round_in_order
from toolkit.quant.visits import Solved, Visits, visits

Floats = NDArray[np.float32]
DAMPING: Final = 0.01
DAMPINGS: Final = (DAMPING, 10 * DAMPING, 100 * DAMPING)
# Columns whose triangle is factorized and inverted in float64 at once.
_LEAF: Final = 256


class NotPositiveDefiniteError(ValueError):
    """A second moment that no damping makes positive definite."""


@dataclass(frozen=True)
class Damped:
    """What is taken for H: `kept` times itself plus `added` [Kp] on its diagonal."""

    kept: np.float32
    added: Floats


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of an input: U [Kp, Kp] upper in the order of visits with U U' = H damped, and the inverses of
    its triangles on the diagonal, _LEAF columns each."""

    upper: Floats
    leaves: tuple[Floats, ...]
    visits: Visits
    damped: Damped

    def solved(self, weight: Floats, spec: QuantSpec, product: Floats | None = None, revisits: int = 0) -> Solved:
        """`weight` [N, K] solved; `product` is W C [N, K] with C = X'X~ / T where the input arrives changed. Columns
        are visited again as often as `revisits` says."""
        white = _whitened(weight, product, self)
        target = _target(white, self, weight.shape[1]) if spec.signed and product is not None else weight
        return round_in_order(weight, target, _Whitened(white, self), self.visits, spec, revisits)

    def solved_by(self, whitening: Floats, weight: Floats, spec: QuantSpec, revisits: int = 0) -> Solved:
        """The same of an input that arrives changed, by the `whitening` [K, Kp] of C."""
        white = device_of(weight).product(weight, whitening)
        target = _target(white, self, weight.shape[1]) if spec.signed else weight
        return round_in_order(weight, target, _Whitened(white, self), self.visits, spec, revisits)

    def whitening(self, cross: Floats, start: int = 0) -> Floats:
        """What rows W are multiplied by for their z [N, Kp]: C U'^-1 [K, Kp] of C = X'X~ / T, damped as H is; or its
        rows from `start` on, of as many rows of C."""
        on, own = device_of(cross), np.arange(cross.shape[0])
        order = on.index(self.visits.order)
        given = float(self.damped.kept) * cross
        given[on.index(own), on.index(start + own)] += on.from_host(self.damped.added[start : start + own.size])
        return _over_upper(on.by_rows(lambda rows: padded(rows, order.shape[0])[:, order], given), self)


class _Whitened:
    """z [N, Kp] of all columns at once."""

    def __init__(self, white: Floats, factor: Factor) -> None:
        self._white, self._upper = white, factor.upper

    def left(self, some: slice, visited: Floats) -> tuple[Floats, Floats]:
        """Returns z [N, n] and U [n, n] of some columns, as `Columns` asks."""
        on = device_of(self._white)
        # A copy: what is left of columns is used up where they are rounded.
        left = self._white[:, some] - (on.product(visited, self._upper[: some.start, some]) if some.start else 0)
        return on.contiguous(left), on.contiguous(self._upper[some, some])

    def whole(self) -> tuple[Floats, Floats]:
        """Returns z and U of all columns, as `Columns` asks."""
        return self._white, self._upper


def damped(order: Visits, channels: int, tokens: float, damping: float = DAMPING) -> Damped:
    """How H of so many channels, a mean over `tokens`, is taken. Channels that are always zero keep their weights.

    What K channels have in common on T tokens is partly the text's accident, the more so the fewer tokens there are:
    all but the diagonal is taken by T / (K + T) (the shape of Ledoit and Wolf's shrinkage; measured in LOG.md).
    Raises NotPositiveDefiniteError if nothing arrives, or something that is no number.
    """
    mean = float(order.diagonal[:channels].mean(dtype=np.float64))
    if not (np.isfinite(mean) and mean > 0):
        raise NotPositiveDefiniteError(f"the mean second moment of the input is {mean}")
    kept = np.float32(1 / (1 + channels / tokens))
    own = np.where(order.diagonal > 0, damping * mean, mean)
    return Damped(kept, ((1 - kept) * order.diagonal + own).astype(np.float32))


def factorize(moment: Floats, block_size: int | Collection[int], tokens: float = math.inf) -> Factor:
    """The factor of H [K, K], a mean over `tokens`, for blocks of `block_size`, or of each of these sizes.

    Raises NotPositiveDefiniteError if even a damping of the mean of the diagonal will not do.
    """
    on, K = device_of(moment), moment.shape[0]
    sizes = (block_size,) if isinstance(block_size, int) else block_size
    order = visits(on.to_host(moment.diagonal()), sizes)
    columns, inside = order.order.size, np.flatnonzero(order.order < K)
    to, of = on.index(inside), on.index(order.order[inside])

    def ordered() -> Floats:
        matrix = on.by_rows(lambda rows: rows[:, of], moment[of])
        if columns > K:
            whole, matrix = matrix, on.zeros((columns, columns))
            matrix[to[:, None], to[None, :]] = whole
        return matrix

    return factorize_ordered(ordered, order, K, tokens)


def factorize_ordered(ordered: Callable[[], Floats], order: Visits, channels: int, tokens: float) -> Factor:
    """The factor of H of so many channels, a mean over `tokens`; `ordered` makes H [Kp, Kp] in the order of visits, or
    what is on and above its diagonal, which is used up.

    Raises NotPositiveDefiniteError as `factorize`.
    """
    for damping in DAMPINGS:
        taken, matrix = damped(order, channels, tokens, damping), ordered()
        on, own = device_of(matrix), device_of(matrix).index(np.arange(order.order.size))
        matrix *= float(taken.kept)
        matrix[own, own] += on.from_host(taken.added[order.order])
        try:
            leaves = _factor_in_place(matrix)
        except np.linalg.LinAlgError:
            continue
        if on.all_finite(matrix):
            return Factor(matrix, leaves, order, taken)
    raise NotPositiveDefiniteError("the second moment of the input is not positive definite")


def corrected_target(weight: Floats, product: Floats, factor: Factor) -> Floats:
    """W' = W C H^-1 [N, K] from `product` = W C [N, K] with C = X'X~ / T, damped alike, so that without an error before
    it W stays W."""
    return _target(_whitened(weight, product, factor), factor, weight.shape[1])


def _target(white: Floats, factor: Factor, channels: int) -> Floats:
    """W' [N, K] of z [N, Kp]."""
    on, order = device_of(white), factor.visits.order
    target = on.empty(white.shape)
    target[:, on.index(order)] = _divided_by_upper(white, factor)
    return on.contiguous(target[:, :channels])


def _factor_in_place(matrix: Floats) -> tuple[Floats, ...]:
    """Replaces H by U upper with U U' = H, from the last _LEAF columns to the first, and returns the inverses of the
    triangles on its diagonal, first one first.

    All but the leaves is products in float32; `numpy.linalg.cholesky` of the whole works on float64 copies. Raises
    LinAlgError if the matrix is not positive definite.
    """
    leaves: list[Floats] = []
    on = device_of(matrix)
    for leaf in reversed(_leaves(matrix.shape[0])):
        above = slice(0, leaf.stop)
        if leaf.stop < matrix.shape[0]:
            on.subtract_product(matrix[above, leaf], matrix[above, leaf.stop :], matrix[leaf, leaf.stop :].T)
        matrix[leaf, leaf], inverse = on.upper_and_inverse(matrix[leaf, leaf])
        matrix[leaf.stop :, leaf] = 0
        matrix[: leaf.start, leaf] = on.product(matrix[: leaf.start, leaf], inverse.T)
        leaves.append(inverse)
    return tuple(reversed(leaves))


def _whitened(weight: Floats, product: Floats | None, factor: Factor) -> Floats:
    """z [N, Kp] in the order of visits: W U, or W C U'^-1 with C damped as H is."""
    on, K = device_of(weight), weight.shape[1]
    order = on.index(factor.visits.order)
    if product is None:
        return on.product(on.by_rows(lambda rows: padded(rows, order.shape[0])[:, order], weight), factor.upper)
    kept, added = float(factor.damped.kept), on.from_host(factor.damped.added[:K])

    def ordered(product: Floats, weight: Floats) -> Floats:
        return padded(kept * product + weight * added, order.shape[0])[:, order]

    return _over_upper(on.by_rows(ordered, product, weight), factor)


def _over_upper(given: Floats, factor: Factor) -> Floats:
    """`given` [N, Kp] U'^-1, in its place."""
    on = device_of(given)
    for leaf, inverse in zip(reversed(_leaves(given.shape[1])), reversed(factor.leaves), strict=True):
        if leaf.stop < given.shape[1]:
            on.subtract_product(given[:, leaf], given[:, leaf.stop :], factor.upper[leaf, leaf.stop :].T)
        given[:, leaf] = on.product(given[:, leaf], inverse.T)
    return given


def padded(rows: Floats, width: int) -> Floats:
    """[n, width] with zeros behind what there is of each row."""
    on, (n, K) = device_of(rows), rows.shape
    return rows if K == width else on.concatenate([rows, on.zeros((n, width - K))], axis=1)


def _divided_by_upper(white: Floats, factor: Factor) -> Floats:
    """z U^-1 [N, Kp]."""
    on = device_of(white)
    target = on.empty(white.shape)
    for leaf, inverse in zip(_leaves(white.shape[1]), factor.leaves, strict=True):
        before = on.product(target[:, : leaf.start], factor.upper[: leaf.start, leaf])
        target[:, leaf] = on.product(white[:, leaf] - before, inverse)
    return target


def _leaves(columns: int) -> list[slice]:
    return [slice(start, min(start + _LEAF, columns)) for start in range(0, columns, _LEAF)]
