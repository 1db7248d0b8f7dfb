"""Memory of arrays that are gone is kept for the next, as long as that is wanted."""

from __future__ import annotations

import ctypes
import platform

import numpy as np
import pytest

from toolkit.device.memory import kept_memory


def _mapped_for_an_array(nbytes: int) -> int:
    """Counts the bytes that glibc's malloc maps from the system for one array of so many (mallinfo2(3))."""

    class Mallinfo2(ctypes.Structure):
        _fields_ = (("before", ctypes.c_size_t * 4), ("hblkhd", ctypes.c_size_t), ("after", ctypes.c_size_t * 5))

    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo2
    before = mallinfo().hblkhd
    array = np.ones(nbytes, np.uint8)
    return int(mallinfo().hblkhd - before) + 0 * int(array[0])


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="of glibc 2.33 and later"
)
def test_large_arrays_are_not_mapped_one_by_one_while_memory_is_kept() -> None:
    nbytes = 100 << 20
    assert _mapped_for_an_array(nbytes) >= nbytes
    with kept_memory():
        assert _mapped_for_an_array(nbytes) == 0
    assert _mapped_for_an_array(nbytes) >= nbytes
