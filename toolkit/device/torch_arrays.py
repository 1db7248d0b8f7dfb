"""torch's arrays as device/arrays.py asks for them: on the CPU, or on a GPU. Nothing else imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from toolkit.device.recordings import Recordings
from toolkit.device.triangles import upper_and_inverse
from toolkit.device.uploads import SMALLEST_SENT, Uploads
from toolkit.device.words import TORCH


class TorchDevice:
    """torch on one of its devices, `kind` such as `cpu` or `cuda:1`; `name` is what `--device` calls it."""

    def __init__(self, kind: str) -> None:
        self._on = torch.device(kind)
        # torch calls its own CPU what `--device` calls numpy's.
        self.name = TORCH if self._on.type == "cpu" else kind
        # Many small steps are launched as one on CUDA alone; elsewhere compiled loops on the host are faster.
        self.rounds_columns = self._on.type == "cuda"
        self._recordings = Recordings() if self._on.type == "cuda" else None
        self._uploads = Uploads(self._on) if self._on.type == "cuda" else None
        self.software = f"torch {torch.__version__}"
        # Apple's GPUs have no float64: there sums over a row or a column are float32, those over a text are not.
        self._wide = torch.float32 if self._on.type == "mps" else torch.float64

    def from_host(self, x: NDArray[np.float32]) -> Any:
        """Returns numpy's array on the device; on the CPU it shares its memory where that may be written to."""
        here = torch.from_numpy(np.require(x, np.float32, ["C", "W"]))
        return self._uploads.sent(here) if self._uploads and x.size >= SMALLEST_SENT else here.to(self._on)

    def to_host(self, x: Any) -> NDArray[np.float32]:
        """Returns an array as numpy's; on the CPU they share their memory."""
        return np.asarray(x.cpu().numpy())

    def index(self, x: NDArray[np.int64]) -> Any:
        """Returns numpy's integers as what indexes arrays of the device."""
        return torch.from_numpy(np.ascontiguousarray(x)).to(self._on)

    def empty(self, shape: Sequence[int]) -> Any:
        """Returns a float32 array whose values are to be filled in."""
        return torch.empty(tuple(shape), dtype=torch.float32, device=self._on)

    def zeros(self, shape: Sequence[int]) -> Any:
        """Returns a float32 array of zeros of this shape."""
        return torch.zeros(tuple(shape), dtype=torch.float32, device=self._on)

    def concatenate(self, pieces: Sequence[Any], axis: int = 0) -> Any:
        """Returns the pieces behind each other along an axis."""
        return torch.cat(tuple(pieces), dim=axis)

    def transpose(self, x: Any, axes: Sequence[int]) -> Any:
        """Returns `x` with its axes in another order, without a copy."""
        return x.permute(*axes)

    def contiguous(self, x: Any) -> Any:
        """Returns `x` with its last axis the one that runs fastest in memory."""
        return x.contiguous()

    def exp(self, x: Any) -> Any:
        """Returns e to the power of each element."""
        return torch.exp(x)

    def sqrt(self, x: Any) -> Any:
        """Returns the square root of each element."""
        return torch.sqrt(x)

    def rint(self, x: Any) -> Any:
        """Returns each element rounded to an integer, half to even."""
        return torch.round(x)

    def nearest_bfloat16(self, x: Any) -> Any:
        """Returns for each element the nearest that bfloat16 holds, half to even."""
        return x.to(torch.bfloat16).to(torch.float32)

    def clip(self, x: Any, low: Any, high: Any) -> Any:
        """Returns each element, or the bound that it is beyond; both bounds are numbers or both arrays."""
        return torch.clamp(x, low, high)

    def reciprocal(self, x: Any) -> Any:
        """Returns one over each element, and zero where that is zero."""
        return torch.where(x != 0, 1 / x, 0.0)

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """Returns the elements of `a` where the condition holds, else those of `b`."""
        return torch.where(condition, a, b)

    def at_largest(self, values: Any, by: Any) -> Any:
        """Returns of `values` [C, N] those where `by` [C, N] is largest, [N]."""
        return values.gather(0, by.argmax(dim=0, keepdim=True))[0]

    def replaced_zeros(self, x: Any) -> Any:
        """Returns `x` with ones where an element is not above zero."""
        return torch.where(x > 0, x, 1.0)

    def by_rows(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """Returns what a function makes of arrays [T, ...], each of whose rows it treats by itself: all at once."""
        return function(*arrays)

    def largest(self, x: Any, axis: int, keepdims: bool = False) -> Any:
        """Returns the largest element along an axis."""
        return torch.amax(x, dim=axis, keepdim=keepdims)

    def smallest(self, x: Any, axis: int) -> Any:
        """Returns the smallest element along an axis."""
        return torch.amin(x, dim=axis)

    def softmax_terms(self, scores: Any) -> Any:
        """Replaces scores by e to the power of what each is below the largest of its row; returns them."""
        scores -= torch.amax(scores.detach(), dim=-1, keepdim=True)
        return scores.exp_()

    def all_finite(self, x: Any) -> bool:
        """Whether no element is NaN or infinite."""
        return bool(torch.isfinite(x).all())

    def column_squares(self, x: Any) -> NDArray[np.float32]:
        """Returns on the host the sum of squares of each column of [T, K]."""
        return self.column_squares_in_double(x).astype(np.float32)

    def column_squares_in_double(self, x: Any) -> NDArray[np.float64]:
        """Returns the same added up in float64."""
        wide = x.to(self._wide)
        return np.asarray((wide * wide).sum(dim=0).cpu().numpy(), np.float64)

    def row_sums(self, x: Any) -> NDArray[np.float64]:
        """Returns on the host the sum of each row of [T, K]."""
        return np.asarray(x.sum(dim=1, dtype=self._wide).cpu().numpy(), np.float64)

    def row_dots(self, a: Any, b: Any) -> NDArray[np.float64]:
        """Returns on the host the sum of the products of two arrays' elements, row by row of [T, K]."""
        return np.asarray((a * b).sum(dim=1, dtype=self._wide).cpu().numpy(), np.float64)

    def square_sum(self, x: Any) -> float:
        """Returns the sum of the squares of all elements."""
        return float((x * x).sum(dtype=self._wide))

    def side_by_side(self, work: Callable[[Any], object], pieces: Iterable[Any]) -> None:
        """Does the work of every piece, one after the other: torch has threads of its own."""
        for piece in pieces:
            work(piece)

    def product(self, left: Any, right: Any) -> Any:
        """Returns left [N, K] right [K, T]."""
        return left @ right

    def square(self, x: Any) -> Any:
        """Returns x' x [K, K] of x [T, K]."""
        return x.T @ x

    def subtract_square(self, to: Any, left: Any) -> None:
        """Takes left [N, n] left' from a symmetric `to` [N, N], in place."""
        to.addmm_(left, left.T, alpha=-1)

    def subtract_product(self, to: Any, left: Any, right: Any) -> None:
        """Takes left [N, n] right [n, T] from `to` [N, T], in place."""
        to.addmm_(left, right, alpha=-1)

    def subtract_outer(self, to: Any, column: Any, row: Any) -> None:
        """Takes the products of `column` [n] and `row` [N] from `to` [n, N], in place."""
        to.addr_(column, row, alpha=-1)

    def upper_and_inverse(self, matrix: Any) -> tuple[Any, Any]:
        """Returns U upper with U U' = a small positive definite matrix, and its inverse, computed in float64: there
        where columns are rounded there, else on the host. Raises LinAlgError where the matrix is none."""
        if not self.rounds_columns:
            upper, inverse = upper_and_inverse(self.to_host(matrix))
            return self.from_host(upper), self.from_host(inverse)
        backwards, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1).double())
        if failed.item():
            raise np.linalg.LinAlgError("the matrix is not positive definite")
        unit = torch.eye(matrix.shape[0], dtype=torch.float64, device=self._on)
        inverse = torch.linalg.solve_triangular(backwards, unit, upper=False)
        return backwards.flip(0, 1).float(), inverse.flip(0, 1).float()

    def inverse_triangles(self, upper: Any) -> Any:
        """Returns the inverse of each of J upper triangles [J, B, B]."""
        unit = torch.eye(upper.shape[-1], device=self._on)
        return torch.linalg.solve_triangular(upper, unit.expand_as(upper), upper=True)

    def bytes_of(self, x: Any) -> NDArray[np.uint8]:
        """Returns on the host integers from 0 to 255 as uint8."""
        return np.asarray(x.to(torch.uint8).cpu().numpy())

    def recorded(self, function: Callable[..., tuple[Any, ...]], *arrays: Any) -> tuple[Any, ...]:
        """Returns what a function makes of arrays; on CUDA its operations are one launch from the second time on."""
        return self._recordings.made(function, arrays) if self._recordings else function(*arrays)

    def write_product(self, to: NDArray[np.float32], left: Any, right: Any) -> None:
        """Writes left [T, D] right [D, n] to the host's `to` [T, n]."""
        to[...] = self.to_host(left @ right)

    def is_out_of_memory(self, problem: BaseException) -> bool:
        """Whether an exception says that the device's memory is full."""
        return isinstance(problem, torch.OutOfMemoryError) or (
            isinstance(problem, RuntimeError) and "out of memory" in str(problem)
        )

    def release(self) -> None:
        """Gives memory that no array needs any more back to the device."""
        if self._recordings:
            self._recordings.forget()
        module = getattr(torch, self._on.type)
        if hasattr(module, "empty_cache"):
            module.empty_cache()


def gpus_here(kinds: Sequence[str]) -> dict[str, int]:
    """How many of each kind of GPU torch can use on this machine; kinds of which there are none are left out."""
    counts = {}
    for kind in kinds:
        module = torch.backends.mps if kind == "mps" else getattr(torch, kind, None)
        if module is not None and module.is_available():
            counts[kind] = 1 if kind == "mps" else module.device_count()
    return counts


def torch_device(kind: str) -> TorchDevice:
    """The one device of a torch name, such as `cpu` or `cuda:1`; the first of a kind is the kind's own."""
    return _device(kind.removesuffix(":0"))


@cache
def _device(kind: str) -> TorchDevice:
    return TorchDevice(kind)


def torch_device_of(x: Any) -> TorchDevice:
    """The device that holds a tensor."""
    return torch_device(str(x.device))
