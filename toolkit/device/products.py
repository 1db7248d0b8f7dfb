"""numpy's matrix products, cut into pieces for several threads.

Which pieces there are follows from the shapes alone, so that the bits of a product do not depend on how many threads
there are: each piece has one (device/blas.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from threading import local
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from toolkit.device.blas import one_blas_thread
from toolkit.machine import threads

Floats = NDArray[np.float32]
Piece = TypeVar("Piece")
# Elements of an array that are worked on at once where each row is treated by itself: 512 KB.
_CACHED: Final = 1 << 17
# A product of fewer operations takes about as long as waking a thread.
_FEW: Final = 1 << 26
# At most so many pieces, each at least so many rows or columns: BLAS copies the other side for every piece.
_PIECES: Final = 16
_LEAST: Final = 256
# Rows of what is taken from an array at once: their product is no memory that the system has to clear first.
_SUBTRACTED_ROWS: Final = 640
# Pieces that no thread has taken yet: those that somebody waits for, and those that wait behind them.
_NEXT: Final[deque[Callable[[], None]]] = deque()
_BEHIND: Final[deque[Callable[[], None]]] = deque()
_asking: Final = local()


def work_behind() -> None:
    """Lets the pieces that this thread asks for from now on wait while there are others: they fill the gaps in which
    these leave a core idle."""
    _asking.behind = True


def side_by_side(work: Callable[[Piece], object], pieces: Iterable[Piece]) -> None:
    """Does the work of every piece, on as many threads as this process may keep busy, numpy's products in each on one.
    It asks for no such work itself."""
    pieces = list(pieces)
    with one_blas_thread():
        if threads() == 1 or len(pieces) == 1:
            for piece in pieces:
                work(piece)
            return
        for done in [_submitted(partial(work, piece)) for piece in pieces]:
            done.result()


def by_rows(function: Callable[..., Floats], *arrays: Floats) -> Floats:
    """Returns what a function makes of arrays [T, ...], each of whose rows it treats by itself, as many at a time as
    stay in a core's cache: numpy's own passes over a whole array run on one core, and at the pace of memory."""
    T, width = arrays[0].shape[0], max(x[:1].size for x in arrays)
    step = max(1, _CACHED // max(width, 1))
    if step >= T:
        return function(*arrays)
    first = function(*(x[:step] for x in arrays))
    made = np.empty((T, *first.shape[1:]), first.dtype)
    made[:step] = first

    def fill(start: int) -> None:
        made[start : start + step] = function(*(x[start : start + step] for x in arrays))

    side_by_side(fill, range(step, T, step))
    return made


def write_product(to: Floats, left: Floats, right: Floats) -> None:
    """Writes left [N, K] right [K, T] to `to` [N, T], columns of a wider array or not, without a copy: BLAS takes the
    distance of rows."""
    (N, K), T = left.shape, right.shape[1]
    if 2 * N * K * T < _FEW:
        with one_blas_thread():
            np.matmul(left, right, out=to)
    elif T >= N:
        side_by_side(lambda some: np.matmul(left, right[:, some], out=to[:, some]), pieces_of(T))
    else:
        side_by_side(lambda some: np.matmul(left[some], right, out=to[some]), pieces_of(N))


def square(x: Floats) -> Floats:
    """Returns x' x [K, K] of x [T, K]. numpy's own copies one triangle to the other element by element."""
    made = np.empty((x.shape[1], x.shape[1]), np.float32)

    def below(some: slice) -> None:
        np.matmul(x[:, some].T, x[:, : some.stop], out=made[some, : some.stop])

    side_by_side(below, reversed(pieces_of(x.shape[1])))
    _mirror(made)
    return made


def subtract_product(to: Floats, left: Floats, right: Floats) -> None:
    """Takes left [N, n] right [n, T] from `to` [N, T]."""

    def subtract(some: slice) -> None:
        to[some] -= left[some] @ right

    side_by_side(subtract, _rows(to.shape[0]))


def subtract_square(to: Floats, left: Floats) -> None:
    """Takes left [N, n] left' from a symmetric `to` [N, N]: half of a product, and its copy."""

    def below(some: slice) -> None:
        to[some, : some.stop] -= left[some] @ left[: some.stop].T

    side_by_side(below, reversed(pieces_of(to.shape[0])))
    _mirror(to)


def _mirror(matrix: Floats) -> None:
    """Copies what is left of each piece's square on the diagonal [N, N] to above it."""

    def above(some: slice) -> None:
        matrix[: some.start, some] = matrix[some, : some.start].T

    side_by_side(above, pieces_of(matrix.shape[0])[1:])


def pieces_of(count: int) -> list[slice]:
    """Returns slices of so many rows or columns that are worked on at once."""
    step = max(_LEAST, -(-count // (64 * _PIECES)) * 64)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _rows(count: int) -> list[slice]:
    return [slice(start, min(start + _SUBTRACTED_ROWS, count)) for start in range(0, count, _SUBTRACTED_ROWS)]


def _submitted(work: Callable[[], object]) -> Future[object]:
    """Has a thread of the pool do some work when its turn comes."""
    done: Future[object] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as problem:
            done.set_exception(problem)

    (_BEHIND if getattr(_asking, "behind", False) else _NEXT).append(run)
    _pool().submit(_take)
    return done


def _take() -> None:
    """Does the work that is next; there is some for each time that this is called."""
    try:
        work = _NEXT.popleft()
    except IndexError:
        work = _BEHIND.popleft()
    work()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads(), "product")
