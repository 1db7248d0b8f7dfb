"""Tensors that are read once for several who want them, until they are told to forget."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.checkpoint.scan import Rows
from toolkit.checkpoint.weights import Origin, Tensors, WeightSource

Floats = NDArray[np.float32]


class Remembered:
    """`Tensors` that reads each piece from its source once, until it is told to forget. Experts are read anew each
    time: those of a layer together would be its memory many times over."""

    def __init__(self, source: Tensors) -> None:
        self._source = source
        self._whole: dict[str, Floats] = {}
        self._rows: dict[tuple[str, int, int], Floats] = {}

    def __reduce__(self) -> tuple[type[Remembered], tuple[Tensors]]:
        """What another process is sent: the source, nothing of what is remembered here."""
        return type(self), (self._source,)

    def names(self) -> list[str]:
        """Lists every tensor, in the order of the source."""
        return self._source.names()

    def read(self, name: str) -> Floats:
        """Reads a whole tensor as float32, once."""
        if names.is_expert(name):
            return self._source.read(name)
        if name not in self._whole:
            self._whole[name] = self._source.read(name)
        return self._whole[name]

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Reads rows [start, stop) as float32, once."""
        if names.is_expert(name):
            return self._source.read_rows(name, start, stop)
        if (name, start, stop) not in self._rows:
            self._rows[name, start, stop] = self._source.read_rows(name, start, stop)
        return self._rows[name, start, stop]

    def forget(self) -> None:
        """Frees what was read so far."""
        self._whole.clear()
        self._rows.clear()


class RememberedWeights(Remembered):
    """The same as a `WeightSource`; `scan` goes to the source each time."""

    def __init__(self, source: WeightSource) -> None:
        super().__init__(source)
        self._weights = source

    def scan(self, chunk_bytes: int) -> Iterator[Rows]:
        """Yields the source's rows, read anew each time."""
        return self._weights.scan(chunk_bytes)

    def decode(self, rows: Rows, start: int, stop: int) -> Floats:
        """Some rows of those that `scan` yielded."""
        return self._weights.decode(rows, start, stop)

    def identity(self) -> tuple[Origin, ...]:
        """What the source comes from, cheaply."""
        return self._weights.identity()

    def digests(self) -> tuple[Origin, ...]:
        """What the source comes from, in full."""
        return self._weights.digests()

    def bytes_read(self) -> int:
        """How many bytes the source has read."""
        return self._weights.bytes_read()


class LastReader(RememberedWeights):
    """Weights for who reads them last: what others had read of them is forgotten as it is read here, on any thread, and
    nothing is remembered."""

    def __init__(self, remembered: RememberedWeights) -> None:
        super().__init__(remembered._weights)
        self._whole, self._rows = remembered._whole, remembered._rows

    def __reduce__(self) -> tuple[type[Remembered], tuple[Tensors]]:
        """What another process is sent: the source for a first reader."""
        return RememberedWeights, (self._weights,)

    def read(self, name: str) -> Floats:
        """Returns a whole tensor as float32, which belongs to its reader alone."""
        found = self._whole.pop(name, None)
        return self._weights.read(name) if found is None else found

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Returns rows [start, stop) as float32, which belong to their reader alone."""
        found = self._rows.pop((name, start, stop), None)
        return self._weights.read_rows(name, start, stop) if found is None else found
