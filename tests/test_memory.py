"""Memory of arrays that are gone is kept for the next, as long as that is wanted."""

from __future__ import annotations

from tests.mapped_memory import ON_GLIBC, mapped_for_an_array
from toolkit.device.memory import kept_memory


@ON_GLIBC
def test_large_arrays_are_not_mapped_one_by_one_while_memory_is_kept() -> None:
    nbytes = 100 << 20
    assert mapped_for_an_array(nbytes) >= nbytes
    with kept_memory():
        assert mapped_for_an_array(nbytes) == 0
    assert mapped_for_an_array(nbytes) >= nbytes
