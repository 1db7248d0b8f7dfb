"""Where the arithmetic of calibration and of the reference runs: numpy here, torch in device/torch_arrays.py.

What both kinds of arrays have in common is written as it is (operators, slices, `reshape`, `sum(axis=…)`); what they
have by other names, or not at all, is a method of their `Device`. To the type checker every array is numpy's.
Products and sums are float32 on every device; what is added up over a whole text is float64, on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from toolkit.device import products
from toolkit.device.triangles import upper_and_inverse
from toolkit.device.words import CPU

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Piece = TypeVar("Piece")


class Device(Protocol):
    """What holds arrays and computes with them. `name` is what `--device` calls it, and `software` whose arithmetic it
    is, with its version. Where it `rounds_columns`, GPTQ's columns are rounded on the device, those of all matrices of
    a format at once, else on the host."""

    name: str
    software: str
    rounds_columns: bool

    def from_host(self, x: Floats) -> Floats:
        """Returns numpy's array on the device; it may share memory with it."""
        ...

    def to_host(self, x: Floats) -> Floats:
        """Returns an array as numpy's; it may share memory with it."""
        ...

    def index(self, x: Integers) -> Integers:
        """Returns numpy's integers as what indexes arrays of the device."""
        ...

    def empty(self, shape: Sequence[int]) -> Floats:
        """Returns a float32 array whose values are to be filled in."""
        ...

    def zeros(self, shape: Sequence[int]) -> Floats:
        """Returns a float32 array of zeros of this shape."""
        ...

    def concatenate(self, pieces: Sequence[Floats], axis: int = 0) -> Floats:
        """Returns the pieces behind each other along an axis."""
        ...

    def transpose(self, x: Floats, axes: Sequence[int]) -> Floats:
        """Returns `x` with its axes in another order, without a copy."""
        ...

    def contiguous(self, x: Floats) -> Floats:
        """Returns `x` with its last axis the one that runs fastest in memory."""
        ...

    def exp(self, x: Floats) -> Floats:
        """Returns e to the power of each element."""
        ...

    def sqrt(self, x: Floats) -> Floats:
        """Returns the square root of each element."""
        ...

    def rint(self, x: Floats) -> Floats:
        """Returns each element rounded to an integer, half to even."""
        ...

    def nearest_bfloat16(self, x: Floats) -> Floats:
        """Returns for each element the nearest that bfloat16 holds, half to even."""
        ...

    def clip(self, x: Floats, low: float | Floats, high: float | Floats) -> Floats:
        """Returns each element, or the bound that it is beyond; both bounds are numbers or both arrays."""
        ...

    def reciprocal(self, x: Floats) -> Floats:
        """Returns one over each element, and zero where that is zero."""
        ...

    def where(self, condition: NDArray[np.bool_], a: Floats, b: Floats) -> Floats:
        """Returns the elements of `a` where the condition holds, else those of `b`."""
        ...

    def at_largest(self, values: Floats, by: Floats) -> Floats:
        """Returns of `values` [C, N] those where `by` [C, N] is largest, [N]."""
        ...

    def replaced_zeros(self, x: Floats) -> Floats:
        """Returns `x` with ones where an element is not above zero."""
        ...

    def largest(self, x: Floats, axis: int, keepdims: bool = False) -> Floats:
        """Returns the largest element along an axis."""
        ...

    def smallest(self, x: Floats, axis: int) -> Floats:
        """Returns the smallest element along an axis."""
        ...

    def softmax_terms(self, scores: Floats) -> Floats:
        """Replaces scores by e to the power of what each is below the largest of its row; returns them."""
        ...

    def all_finite(self, x: Floats) -> bool:
        """Whether no element is NaN or infinite."""
        ...

    def by_rows(self, function: Callable[..., Floats], *arrays: Floats) -> Floats:
        """Returns what a function makes of arrays [T, ...], each of whose rows it treats by itself."""
        ...

    def column_squares(self, x: Floats) -> Floats:
        """Returns on the host the sum of squares of each column of [T, K]."""
        ...

    def column_squares_in_double(self, x: Floats) -> Doubles:
        """Returns the same added up in float64."""
        ...

    def row_sums(self, x: Floats) -> Doubles:
        """Returns on the host the float64 sum of each row of [T, K]."""
        ...

    def row_dots(self, a: Floats, b: Floats) -> Doubles:
        """Returns on the host the float64 sum of the products of two arrays' elements, row by row of [T, K]."""
        ...

    def square_sum(self, x: Floats) -> float:
        """Returns the sum of the squares of all elements."""
        ...

    def side_by_side(self, work: Callable[[Piece], object], pieces: Iterable[Piece]) -> None:
        """Does the work of every piece, which asks for no such work itself."""
        ...

    def product(self, left: Floats, right: Floats) -> Floats:
        """Returns left [N, K] right [K, T]."""
        ...

    def square(self, x: Floats) -> Floats:
        """Returns x' x [K, K] of x [T, K]."""
        ...

    def subtract_product(self, to: Floats, left: Floats, right: Floats) -> None:
        """Takes left [N, n] right [n, T] from `to` [N, T], in place."""
        ...

    def subtract_square(self, to: Floats, left: Floats) -> None:
        """Takes left [N, n] left' from a symmetric `to` [N, N], in place."""
        ...

    def write_product(self, to: Floats, left: Floats, right: Floats) -> None:
        """Writes left [T, D] right [D, n] to the host's `to` [T, n], which may be columns of a wider array."""
        ...

    def subtract_outer(self, to: Floats, column: Floats, row: Floats) -> None:
        """Takes the products of `column` [n] and `row` [N] from `to` [n, N], in place."""
        ...

    def upper_and_inverse(self, matrix: Floats) -> tuple[Floats, Floats]:
        """Returns U upper with U U' = a small positive definite matrix, and its inverse, computed in float64. Raises
        LinAlgError where the matrix is none."""
        ...

    def inverse_triangles(self, upper: Floats) -> Floats:
        """Returns the inverse of each of J upper triangles [J, B, B]."""
        ...

    def bytes_of(self, x: Floats) -> NDArray[np.uint8]:
        """Returns on the host integers from 0 to 255 as uint8."""
        ...

    def recorded(self, function: Callable[..., tuple[Floats, ...]], *arrays: Floats) -> tuple[Floats, ...]:
        """Returns what a function makes of arrays by operations on the device alone. Where the device can launch many
        as one, it does so from the second call on that has an equal function and arrays of these shapes; what comes
        back may be overwritten by that."""
        ...

    def is_out_of_memory(self, problem: BaseException) -> bool:
        """Whether an exception says that the device's memory is full."""
        ...

    def release(self) -> None:
        """Gives memory that no array needs any more back to the device."""
        ...


class _Numpy:
    """numpy on the host: the same bits as ever, and nothing to install."""

    name, software, rounds_columns = CPU, f"numpy {np.__version__}", False

    def from_host(self, x: Floats) -> Floats:
        """Returns numpy's array on the device; it may share memory with it."""
        return x

    def to_host(self, x: Floats) -> Floats:
        """Returns an array as numpy's; it may share memory with it."""
        return x

    def index(self, x: Integers) -> Integers:
        """Returns numpy's integers as what indexes arrays of the device."""
        return x

    def empty(self, shape: Sequence[int]) -> Floats:
        """Returns a float32 array whose values are to be filled in."""
        return np.empty(shape, np.float32)

    def zeros(self, shape: Sequence[int]) -> Floats:
        """Returns a float32 array of zeros of this shape."""
        return np.zeros(shape, np.float32)

    def concatenate(self, pieces: Sequence[Floats], axis: int = 0) -> Floats:
        """Returns the pieces behind each other along an axis."""
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=axis)

    def transpose(self, x: Floats, axes: Sequence[int]) -> Floats:
        """Returns `x` with its axes in another order, without a copy."""
        return x.transpose(axes)

    def contiguous(self, x: Floats) -> Floats:
        """Returns `x` with its last axis the one that runs fastest in memory."""
        return np.ascontiguousarray(x)

    def exp(self, x: Floats) -> Floats:
        """Returns e to the power of each element."""
        return np.asarray(np.exp(x))

    def sqrt(self, x: Floats) -> Floats:
        """Returns the square root of each element."""
        return np.asarray(np.sqrt(x))

    def rint(self, x: Floats) -> Floats:
        """Returns each element rounded to an integer, half to even."""
        return np.asarray(np.rint(x))

    def nearest_bfloat16(self, x: Floats) -> Floats:
        """Returns for each element the nearest that bfloat16 holds, half to even."""
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)

    def clip(self, x: Floats, low: float | Floats, high: float | Floats) -> Floats:
        """Returns each element, or the bound that it is beyond; both bounds are numbers or both arrays."""
        return np.clip(x, low, high)

    def reciprocal(self, x: Floats) -> Floats:
        """Returns one over each element, and zero where that is zero."""
        return np.where(x != 0, 1 / np.where(x != 0, x, np.float32(1)), np.float32(0))

    def where(self, condition: NDArray[np.bool_], a: Floats, b: Floats) -> Floats:
        """Returns the elements of `a` where the condition holds, else those of `b`."""
        return np.where(condition, a, b)

    def at_largest(self, values: Floats, by: Floats) -> Floats:
        """Returns of `values` [C, N] those where `by` [C, N] is largest, [N]."""
        return np.asarray(np.take_along_axis(values, by.argmax(axis=0)[None], axis=0)[0])

    def replaced_zeros(self, x: Floats) -> Floats:
        """Returns `x` with ones where an element is not above zero."""
        return np.where(x > 0, x, np.float32(1))

    def largest(self, x: Floats, axis: int, keepdims: bool = False) -> Floats:
        """Returns the largest element along an axis."""
        return np.asarray(x.max(axis=axis, keepdims=keepdims))

    def smallest(self, x: Floats, axis: int) -> Floats:
        """Returns the smallest element along an axis."""
        return np.asarray(x.min(axis=axis))

    def softmax_terms(self, scores: Floats) -> Floats:
        """Replaces scores by e to the power of what each is below the largest of its row; returns them."""
        scores -= scores.max(axis=-1, keepdims=True)
        return np.exp(scores, out=scores)

    def all_finite(self, x: Floats) -> bool:
        """Whether no element is NaN or infinite."""
        return bool(np.isfinite(x).all())

    def by_rows(self, function: Callable[..., Floats], *arrays: Floats) -> Floats:
        """Some rows after the other, as many as stay in a core's cache, on every core: numpy's own passes over a whole
        array run on one, and at the pace of memory."""
        return products.by_rows(function, *arrays)

    def column_squares(self, x: Floats) -> Floats:
        """Returns on the host the sum of squares of each column of [T, K]."""
        return np.asarray(np.einsum("tk,tk->k", x, x))

    def column_squares_in_double(self, x: Floats) -> Doubles:
        """Returns the same added up in float64."""
        return np.asarray(np.einsum("tk,tk->k", x, x, dtype=np.float64))

    def row_sums(self, x: Floats) -> Doubles:
        """Returns on the host the float64 sum of each row of [T, K]."""
        return np.asarray(x.sum(axis=1, dtype=np.float64))

    def row_dots(self, a: Floats, b: Floats) -> Doubles:
        """Returns on the host the float64 sum of the products of two arrays' elements, row by row of [T, K]."""
        return np.asarray(np.einsum("tv,tv->t", a, b, dtype=np.float64))

    def square_sum(self, x: Floats) -> float:
        """Returns the sum of the squares of all elements."""
        return float(np.vdot(x, x))

    def side_by_side(self, work: Callable[[Piece], object], pieces: Iterable[Piece]) -> None:
        """Does the work of every piece on several threads; it asks for no such work itself."""
        products.side_by_side(work, pieces)

    def product(self, left: Floats, right: Floats) -> Floats:
        """Returns left [N, K] right [K, T]."""
        made = np.empty((left.shape[0], right.shape[1]), np.float32)
        products.write_product(made, left, right)
        return made

    def square(self, x: Floats) -> Floats:
        """Returns x' x [K, K] of x [T, K]."""
        return products.square(x)

    def subtract_product(self, to: Floats, left: Floats, right: Floats) -> None:
        """Takes left [N, n] right [n, T] from `to` [N, T], in place."""
        products.subtract_product(to, left, right)

    def subtract_square(self, to: Floats, left: Floats) -> None:
        """Takes left [N, n] left' from a symmetric `to` [N, N], in place."""
        products.subtract_square(to, left)

    def write_product(self, to: Floats, left: Floats, right: Floats) -> None:
        """Writes left [T, D] right [D, n] to `to` [T, n], columns of a wider array or not, without a copy."""
        products.write_product(to, left, right)

    def subtract_outer(self, to: Floats, column: Floats, row: Floats) -> None:
        """Takes the products of `column` [n] and `row` [N] from `to` [n, N], in place."""
        to -= column[:, None] * row

    def upper_and_inverse(self, matrix: Floats) -> tuple[Floats, Floats]:
        """Returns U upper with U U' = a small positive definite matrix, and its inverse, computed in float64. Raises
        LinAlgError where the matrix is none."""
        return upper_and_inverse(matrix)

    def inverse_triangles(self, upper: Floats) -> Floats:
        """Returns the inverse of each of J upper triangles [J, B, B]."""
        return np.asarray(np.linalg.inv(upper.astype(np.float64)), np.float32)

    def bytes_of(self, x: Floats) -> NDArray[np.uint8]:
        """Returns on the host integers from 0 to 255 as uint8."""
        return x.astype(np.uint8)

    def recorded(self, function: Callable[..., tuple[Floats, ...]], *arrays: Floats) -> tuple[Floats, ...]:
        """Returns what a function makes of arrays; nothing is recorded."""
        return function(*arrays)

    def is_out_of_memory(self, problem: BaseException) -> bool:
        """Whether an exception says that the device's memory is full."""
        return False

    def release(self) -> None:
        """Gives memory that no array needs any more back to the device."""
        return None


NUMPY: Final[Device] = _Numpy()


def device_of(x: Floats) -> Device:
    """The device that holds an array."""
    if isinstance(x, np.ndarray):
        return NUMPY
    from toolkit.device.torch_arrays import torch_device_of

    return torch_device_of(x)
