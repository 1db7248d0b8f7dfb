"""What glibc's malloc maps from the system, where it says so."""

from __future__ import annotations

import ctypes
import platform

import numpy as np
import pytest

ON_GLIBC = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="of glibc 2.33 and later"
)


def mapped_for_an_array(nbytes: int, _: int = 0) -> int:
    """Counts the bytes that are mapped for one array of so many (mallinfo2(3)); a pool's pieces may ask for it."""

    class Mallinfo2(ctypes.Structure):
        _fields_ = (("before", ctypes.c_size_t * 4), ("hblkhd", ctypes.c_size_t), ("after", ctypes.c_size_t * 5))

    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo2
    before = mallinfo().hblkhd
    array = np.ones(nbytes, np.uint8)
    return int(mallinfo().hblkhd - before) + 0 * int(array[0])
