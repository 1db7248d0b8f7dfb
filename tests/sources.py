"""Weight sources that tests watch or change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.scan import Rows
from toolkit.checkpoint.weights import Origin, WeightSource
from toolkit.errors import NonFiniteError

Floats = NDArray[np.float32]


class Watched:
    """A source that notes what is decoded, and finds `broken`, if any, not to be finite."""

    def __init__(self, source: WeightSource, broken: str = "") -> None:
        self._source, self._broken = source, broken
        self.bytes_read = source.bytes_read
        self.decoded: set[str] = set()

    def names(self) -> list[str]:
        return self._source.names()

    def read(self, name: str) -> Floats:
        return self._source.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        return self._source.read_rows(name, start, stop)

    def scan(self, chunk_bytes: int) -> Iterator[Rows]:
        return self._source.scan(chunk_bytes)

    def decode(self, rows: Rows, start: int, stop: int) -> Floats:
        self.decoded.add(rows.name)
        if rows.name == self._broken:
            raise NonFiniteError(f"{rows.name} is broken")
        return self._source.decode(rows, start, stop)

    def identity(self) -> tuple[Origin, ...]:
        return self._source.identity()

    def digests(self) -> tuple[Origin, ...]:
        return self._source.digests()


class Changed:
    """A checkpoint with some tensors replaced."""

    def __init__(self, source: Any, changes: dict[str, Floats]) -> None:
        self._source, self._changes = source, changes
        self.names = source.names

    def read(self, name: str) -> Floats:
        return np.asarray(self._changes.get(name, self._source.read(name)), np.float32)

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        return self.read(name)[start:stop]
