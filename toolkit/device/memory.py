"""What glibc's malloc does with the memory of arrays that are gone: by itself it gives large ones back to the system,
which clears every page before the next array gets it (mallopt(3)). Elsewhere nothing is changed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

# glibc's <malloc.h>.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_MMAP_MAX: Final = -4
_M_ARENA_MAX: Final = -8
_LARGEST_INT: Final = (1 << 31) - 1
# What it comes to by itself when large arrays come and go: the mappings that it makes at most, and from how many bytes
# on (DEFAULT_MMAP_MAX, DEFAULT_MMAP_THRESHOLD_MAX).
_MAPPINGS: Final = 65536
_MAPPED_BYTES: Final = 32 << 20


def keep_memory() -> None:
    """Lets this process keep what it frees, in one heap, for what it asks for next."""
    if mallopt := _of_malloc("mallopt"):
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keeps memory meanwhile, and gives back what is free in the end."""
    keep_memory()
    try:
        yield
    finally:
        if mallopt := _of_malloc("mallopt"):
            mallopt(_M_MMAP_MAX, _MAPPINGS)
            mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
            mallopt(_M_TRIM_THRESHOLD, _MAPPED_BYTES)
        if trim := _of_malloc("malloc_trim"):
            trim(0)


def _of_malloc(name: str) -> Any:
    """A function of the C library, where that is glibc, else None."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  others have functions of these names that mean other things
        return getattr(library, name)
    except (AttributeError, OSError, TypeError):
        return None
