"""How many threads numpy's matrix products take, where that can be said: OpenBLAS, which numpy's wheels bring."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Final

import numpy as np

# As numpy's wheels name its functions, of 64-bit and of 32-bit integers, and as OpenBLAS does.
_NAMES: Final = tuple(
    f"{before}openblas_{{}}_num_threads{behind}" for before in ("scipy_", "") for behind in ("64_", "")
)
_lock: Final = Lock()
# For each who holds OpenBLAS to one thread: how many it had before the first of them came.
_held: Final[list[int]] = []


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Holds numpy's products to one thread each, in the whole process, until the last of those who do so at a time
    leaves; where its BLAS is another, nothing changes.

    OpenBLAS's threads wait for each other in loops, so that beside any other work a product takes a multiple of its
    operations; what is large is cut into products for threads that sleep instead (device/products.py).
    """
    found = _openblas()
    if found is None:
        yield
        return
    asked, say = found
    with _lock:
        _held.append(_held[0] if _held else asked())
        say(1)
    try:
        yield
    finally:
        with _lock:
            before = _held.pop()
            if not _held:
                say(before)


@cache
def _openblas() -> tuple[Callable[[], int], Callable[[int], object]] | None:
    """What tells OpenBLAS's number of threads, and what says it."""
    for library in _libraries():
        for name in _NAMES:
            try:
                asked, say = getattr(library, name.format("get")), getattr(library, name.format("set"))
            except AttributeError:
                continue
            asked.restype, asked.argtypes, say.restype, say.argtypes = ctypes.c_int, [], None, [ctypes.c_int]
            return asked, say
    return None


def _libraries() -> Iterator[ctypes.CDLL]:
    """Libraries that numpy has loaded: its own, through which its dependencies are found, but on Windows."""
    folder = Path(np.__file__).parent
    places = [folder / "_core"] if sys.platform != "win32" else [folder.with_name("numpy.libs")]
    wanted = "_multiarray_umath*" if sys.platform != "win32" else "*openblas*.dll"
    for place in places:
        for path in sorted(place.glob(wanted)):
            try:
                yield ctypes.CDLL(str(path))
            except OSError:
                continue
