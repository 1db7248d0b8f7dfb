"""Linears that read the same and whose rows a checkpoint has in one tensor, one behind the other, each for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.scan import Rows
from toolkit.checkpoint.weights import WeightSource
from toolkit.names import weight

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class _Part:
    """Rows [start, stop) of a stored tensor, which are a tensor of their own."""

    name: str
    stored: str
    start: int
    stop: int


def unmerged(source: WeightSource, config: ModelConfig, by_columns: Callable[[str], bool]) -> WeightSource:
    """The source with a tensor for each linear; itself where a checkpoint has them so. `by_columns` says of a tensor
    whether its rows come from all of its stored bytes together."""
    return MergedRows(source, config, by_columns) if config.structure.merged else source


class MergedRows:
    """A `WeightSource` over another, whose rows are handed on as they are read."""

    def __init__(self, source: WeightSource, config: ModelConfig, by_columns: Callable[[str], bool]) -> None:
        self._source, self._by_columns = source, by_columns
        self._of_stored: dict[str, list[_Part]] = {}
        for module, linears in decoder_of(config).merged.items():
            ends = list(accumulate(linear.out_features for linear in linears))
            self._of_stored[weight(module)] = [
                _Part(linear.weight, weight(module), stop - linear.out_features, stop)
                for linear, stop in zip(linears, ends, strict=True)
            ]
        self._parts = {part.name: part for parts in self._of_stored.values() for part in parts}
        self.identity, self.digests, self.bytes_read = source.identity, source.digests, source.bytes_read

    def names(self) -> list[str]:
        """Lists every tensor's name, the parts of one where it stands."""
        own = self._of_stored
        return [
            name
            for stored in self._source.names()
            for name in ([part.name for part in own[stored]] if stored in own else [stored])
        ]

    def read(self, name: str) -> Floats:
        """Reads a whole tensor in float32."""
        part = self._parts.get(name)
        return self._source.read_rows(part.stored, part.start, part.stop) if part else self._source.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows [start, stop) of a tensor in float32."""
        part = self._parts.get(name)
        if part is None:
            return self._source.read_rows(name, start, stop)
        return self._source.read_rows(part.stored, part.start + start, part.start + stop)

    def scan(self, chunk_bytes: int) -> Iterator[Rows]:
        """As the source's, each piece cut where a tensor ends, without its bytes where they belong to all of them."""
        for rows in self._source.scan(chunk_bytes):
            if rows.name not in self._of_stored:
                yield rows
                continue
            met = [part for part in self._of_stored[rows.name] if rows.start < part.stop and part.start < rows.stop]
            release = _after(len(met), rows.release)
            for part in met:
                start, stop = max(rows.start, part.start), min(rows.stop, part.stop)
                raw = None
                if rows.raw is not None and not self._by_columns(rows.name):
                    each = rows.raw.nbytes // (rows.stop - rows.start)
                    raw = rows.raw[(start - rows.start) * each : (stop - rows.start) * each]
                yield Rows(part.name, start - part.start, stop - part.start, raw, release)

    def decode(self, rows: Rows, start: int, stop: int) -> Floats:
        """Some rows of those that `scan` yielded."""
        part = self._parts.get(rows.name)
        if part is None:
            return self._source.decode(rows, start, stop)
        stored = Rows(part.stored, part.start + rows.start, part.start + rows.stop, rows.raw)
        return self._source.decode(stored, part.start + start, part.start + stop)


def _after(count: int, release: Callable[[], None]) -> Callable[[], None]:
    """What gives memory back at the last of `count` calls, which may come from any thread."""
    left = iter(range(count - 1, -1, -1))

    def released() -> None:
        if next(left) == 0:
            release()

    return released
