"""GPTQ from few tokens: the same solution as quant/gptq.py's, where there are fewer of them than channels.

With Y = sqrt(kept / T) X~ [T, K] and D = `added` on the diagonal, H damped is D + Y'Y, and the loss of a row is
|r + Y e'|^2 + e D e' for its error e, where r = sqrt(kept / T) (X~ - X) w' is what the layers before have cost. Columns
come in strides; the best e of all columns F behind a stride B follows from r, so that B sees
S = D_B + Y_B' P Y_B and g = r' P Y_B with P = (1 + Y_F D_F^-1 Y_F')^-1 [T, T]. P is found from the last stride to the
first, P - P Y_B S^-1 Y_B' P.
N output features, K input features, Kp = K padded to whole blocks, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.device.arrays import Integers, device_of
from toolkit.quant.blockwise import QuantSpec
from toolkit.quant.gptq import DAMPINGS, NotPositiveDefiniteError, damped, padded
from toolkit.quant.in_order import round_in_order
from toolkit.quant.visits import Solved, Visits, blocks_of, visits

Floats = NDArray[np.float32]
# Columns for which P, and what the layers before have cost, are updated at once: a pass over either takes as long as
# the product with a single stride.
_UPDATED_TOGETHER: Final = 512


def products_of_tokens(tokens: int, channels: int, rows: int) -> float:
    """How many operations GPTQ takes for `rows` that read an input, from its tokens: both products with what the layers
    before have cost, P, and the residual before and after each stride."""
    T, K, N = float(tokens), channels, rows
    return 4 * T * T * K + 6 * T * N * K


def products_of_moment(tokens: int, channels: int, rows: int) -> float:
    """The same from its second moment: that, W C or C and its whitening, U, and the products with these
    (quant/gptq.py)."""
    T, K, N = float(tokens), channels, rows
    white = 4 * T * N * K + N * K**2 if N < K else 2 * T * K**2 + K**3 + 2 * N * K**2
    return T * K**2 + white + K**3 / 3 + N * K**2


def tokens_taken(tokens: int, channels: int, most: int) -> int:
    """How many of a text's tokens GPTQ takes of an input: at most so many, unless that is 0, where the channels are
    more than twice as many as the text has tokens."""
    return min(tokens, most) if most and channels > 2 * tokens else tokens


def pays(tokens: int, channels: int, rows: int) -> bool:
    """Whether an input's tokens are fewer operations than its second moment."""
    return products_of_tokens(tokens, channels, rows) < products_of_moment(tokens, channels, rows)


@dataclass(frozen=True)
class _Stride:
    """U and its inverse [n, n] with U U' = S, and P Y_B [T, n]."""

    some: slice
    upper: Floats
    inverse: Floats
    seen: Floats


@dataclass(frozen=True)
class TokenFactor:
    """What GPTQ needs of an input's tokens: Y [T, Kp] in the order of visits, sqrt(kept / T) (X~ - X) [T, K], strides
    from the first, P of all columns, and D [Kp] in the order of visits."""

    tokens: Floats
    moved: Floats
    strides: tuple[_Stride, ...]
    whole: Floats
    added: Floats
    visits: Visits

    def solved(self, weight: Floats, spec: QuantSpec) -> Solved:
        """`weight` [N, K] solved against what arrives."""
        behind = device_of(weight).product(weight, self.moved.T)
        target = self._target(weight, behind) if spec.signed else weight
        return round_in_order(weight, target, _Residual(weight, behind, self), self.visits, spec)

    def _target(self, weight: Floats, behind: Floats) -> Floats:
        """W' [N, K]: the best that is not rounded."""
        on = device_of(weight)
        moved = on.product(on.product(behind, self.whole), self.tokens) / on.from_host(self.added)
        target = on.empty(moved.shape)
        target[:, on.index(self.visits.order)] = moved
        return on.contiguous(weight - target[:, : weight.shape[1]])


class _Residual:
    """r [N, T] as columns are rounded: `_behind` knows the errors of the first `_counted` columns."""

    def __init__(self, weight: Floats, behind: Floats, factor: TokenFactor) -> None:
        self._factor, self._behind, self._strides = factor, behind, iter(factor.strides)
        on, order = device_of(weight), factor.visits.order
        wide = on.zeros((weight.shape[0], order.size))
        wide[:, : weight.shape[1]] = weight
        self._weight = wide[:, on.index(order)]
        self._counted = 0

    def left(self, some: slice, visited: Floats) -> tuple[Floats, Floats]:
        """Returns z [N, n] and U [n, n] of the next stride, as `Columns` asks."""
        stride, tokens = next(self._strides), self._factor.tokens
        on, fresh = device_of(tokens), slice(self._counted, some.start)
        errors = self._weight[:, fresh] - visited[:, fresh]
        if some.start - self._counted >= _UPDATED_TOGETHER:
            on.subtract_product(self._behind, errors, tokens[:, fresh].T)
            self._counted, fresh = some.start, slice(some.start, some.start)
        behind = on.product(self._behind, stride.seen)
        if fresh.stop > fresh.start:
            on.subtract_product(behind, errors, on.product(tokens[:, fresh].T, stride.seen))
        left = on.product(self._weight[:, some], stride.upper)
        on.subtract_product(left, behind, stride.inverse.T)
        return on.contiguous(left), stride.upper

    def whole(self) -> None:
        """Returns none: U of all columns is what is saved here."""
        return None


def factorize_tokens(exact: Floats, arriving: Floats, *specs: QuantSpec) -> TokenFactor:
    """The factor of an input [T, K] as it is and as it arrives, for matrices of these specs, signed all or none.

    Raises NotPositiveDefiniteError if even a damping of the mean of the diagonal will not do.
    """
    on, (T, K) = device_of(arriving), arriving.shape
    moments = on.column_squares(arriving) / np.float32(T)
    order = visits(moments, blocks_of(specs, K))
    places = on.index(order.order)
    for damping in DAMPINGS:
        taken = damped(order, K, T, damping)
        scale = float(np.sqrt(taken.kept / np.float32(T)))
        tokens, added = on.by_rows(partial(_ordered, scale, places), arriving), taken.added[order.order]
        try:
            strides, whole = _backwards(tokens, added, order.strides(specs[0]))
        except np.linalg.LinAlgError:
            continue
        if on.all_finite(whole):
            moved = on.by_rows(partial(_moved, scale), arriving, exact)
            return TokenFactor(tokens, moved, strides, whole, added, order)
    raise NotPositiveDefiniteError("the second moment of the input is not positive definite")


def _moved(scale: float, arriving: Floats, exact: Floats) -> Floats:
    """By how much rows [n, K] differ from what they are exactly, scaled."""
    return scale * (arriving - exact)


def _ordered(scale: float, places: Integers, rows: Floats) -> Floats:
    """Rows [n, K], scaled and padded to whole blocks, [n, Kp] in the order of visits."""
    return padded(scale * rows, places.shape[0])[:, places]


def _backwards(tokens: Floats, added: Floats, strides: list[slice]) -> tuple[tuple[_Stride, ...], Floats]:
    """Every stride, and P of all columns. Raises LinAlgError where float32 does not carry it."""
    on, found = device_of(tokens), list[_Stride]()
    whole = on.from_host(np.eye(tokens.shape[0], dtype=np.float32))
    while strides:
        together = [some for some in strides if some.stop > strides[-1].stop - _UPDATED_TOGETHER]
        strides = strides[: -len(together)]
        first = together[0].start
        columns = on.contiguous(tokens[:, first : together[-1].stop])
        seen, weighed = on.product(whole, columns), on.empty(columns.shape)
        for some in reversed(together):
            own, before = slice(some.start - first, some.stop - first), slice(0, some.start - first)
            here = on.contiguous(seen[:, own])
            common = on.product(columns[:, own].T, here)
            upper, inverse = on.upper_and_inverse(common + on.from_host(np.diag(added[some])))
            weighed[:, own] = on.product(here, inverse.T)
            found.append(_Stride(some, upper, inverse, here))
            if some.start > first:
                passed = on.product(weighed[:, own].T, columns[:, before])
                on.subtract_product(seen[:, before], weighed[:, own], passed)
        on.subtract_square(whole, weighed)
    return tuple(reversed(found)), whole
