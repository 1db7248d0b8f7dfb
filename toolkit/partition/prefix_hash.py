"""SHA-256 of a data file while it is being filled: its beginning is read back as soon as no more will change there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from toolkit.graph.layout import Unit

_READ_BYTES: Final = 8 << 20


class PrefixHash:
    """The hash of the part before the first unit that is not whole; `finish` names tensors in any order.

    `keep_cached` False gives what is hashed back to the system: a stream longer than memory can only push other things
    out of the page cache, and every fresh page costs (on a virtual machine as much as quantizing, LOG.md).
    """

    def __init__(self, units: Iterable[Unit], nbytes: int, path: Path, keep_cached: bool) -> None:
        self._nbytes, self._path, self._keep_cached = nbytes, path, keep_cached
        self._units = sorted(units, key=lambda unit: unit.slots[0].offset)
        self._finished: set[str] = set()
        self._sha = hashlib.sha256()
        self._hashed = 0

    def finish(self, tensors: list[str]) -> None:
        """Takes tensors whose bytes are all written, and hashes as far as they allow."""
        self._finished.update(tensors)
        while self._units and self._finished.issuperset(self._units[0].sources):
            self._units.pop(0)
        end = self._units[0].slots[0].offset if self._units else self._nbytes
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._hashed)
            first = self._hashed
            while self._hashed < end:
                piece = file.read(min(_READ_BYTES, end - self._hashed))
                self._sha.update(piece)
                self._hashed += len(piece)
            if not self._keep_cached and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), first, end - first, os.POSIX_FADV_DONTNEED)

    @property
    def bytes_read(self) -> int:
        """Returns how many bytes of the file were read."""
        return self._hashed

    def hexdigest(self) -> str:
        """The whole file's; every tensor must have been named."""
        assert not self._units
        return self._sha.hexdigest()
