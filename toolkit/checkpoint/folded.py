"""A checkpoint with channel scales moved from the readers of an input to its writers: the same function, other weights.

Columns of a reader are multiplied by s, rows of a writer divided by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.linears import LinearInput
from toolkit.checkpoint.scan import Rows
from toolkit.checkpoint.weights import WeightSource
from toolkit.names import weight

Floats = NDArray[np.float32]


class FoldedTensors:
    """A `WeightSource` over another. `scales` has s [width] for each input that is folded, by the input's name."""

    def __init__(self, source: WeightSource, inputs: Sequence[LinearInput], scales: Mapping[str, Floats]) -> None:
        self._source = source
        self.identity, self.digests, self.names = source.identity, source.digests, source.names
        self.bytes_read = source.bytes_read
        self._columns: dict[str, Floats] = {}
        self._rows: dict[str, Floats] = {}
        for given in inputs:
            if given.name in scales:
                scale = scales[given.name]
                self._columns |= {weight(reader): scale for reader in given.readers}
                self._rows |= {writer: np.float32(1) / written_scale(given, scale) for writer in given.writers}

    def read(self, name: str) -> Floats:
        """A whole tensor in float32, scaled."""
        return self._scaled(name, self._source.read(name), 0)

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows [start, stop) of a tensor in float32, scaled."""
        return self._scaled(name, self._source.read_rows(name, start, stop), start)

    def scan(self, chunk_bytes: int) -> Iterator[Rows]:
        """Passes the source's rows on; `decode` scales them."""
        return self._source.scan(chunk_bytes)

    def decode(self, rows: Rows, start: int, stop: int) -> Floats:
        """Some rows of a scaled tensor."""
        return self._scaled(rows.name, self._source.decode(rows, start, stop), start)

    def _scaled(self, name: str, values: Floats, start: int) -> Floats:
        if name in self._columns:
            values = values * self._columns[name]
        if name in self._rows:
            factors = self._rows[name][start : start + values.shape[0]]
            values = values * factors.reshape(-1, *[1] * (values.ndim - 1))
        return values


def written_scale(given: LinearInput, scale: Floats) -> Floats:
    """`scale` [width] of an input by the rows of its writers: one of each set of channels that share a row."""
    heads = scale.reshape(-1, given.shared, given.head_dim)
    return np.ascontiguousarray(heads[:, 0]).reshape(-1)
