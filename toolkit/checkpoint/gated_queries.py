"""Queries and gates of attention's output, whose rows a checkpoint has in one tensor: [query | gate] of each head."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.scan import Rows, whole_tensors
from toolkit.checkpoint.weights import WeightSource

Floats = NDArray[np.float32]


def with_gates_apart(source: WeightSource, config: ModelConfig) -> WeightSource:
    """The source with a tensor for queries and one for gates; itself where attention has no gates."""
    return GatedQueries(source, config) if decoder_of(config).gated else source


class GatedQueries:
    """A `WeightSource` over another. The tensors of both are scanned whole, queries first."""

    def __init__(self, source: WeightSource, config: ModelConfig) -> None:
        self._source, self._head_dim = source, config.head_dim
        # Which tensor of the source has a tensor's rows, and whether they stand behind (1) or before (0) the other's.
        self._parts: dict[str, tuple[str, int]] = {}
        for attention in decoder_of(config).gated:
            assert attention.gate_proj
            for query, gate in zip(attention.q_proj.tensors, attention.gate_proj.tensors, strict=True):
                self._parts |= {query: (query, 0), gate: (query, 1)}
        self._gate_of = {stored: name for name, (stored, part) in self._parts.items() if part == 1}
        self.identity, self.digests, self.bytes_read = source.identity, source.digests, source.bytes_read

    def names(self) -> list[str]:
        """Lists every tensor's name, a gate's behind its query's."""
        return [name for stored in self._source.names() for name in (stored, self._gate_of.get(stored)) if name]

    def read(self, name: str) -> Floats:
        """Reads a whole tensor in float32."""
        if name not in self._parts:
            return self._source.read(name)
        stored, part = self._parts[name]
        return self._cut(self._source.read(stored), part)

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows [start, stop) of a tensor in float32."""
        if name not in self._parts:
            return self._source.read_rows(name, start, stop)
        (stored, part), width = self._parts[name], self._head_dim
        first, last = start // width, -(-stop // width)
        whole_heads = self._source.read_rows(stored, first * 2 * width, last * 2 * width)
        return self._cut(whole_heads, part)[start - first * width : stop - first * width]

    def scan(self, chunk_bytes: int) -> Iterator[Rows]:
        """As the source's, each of the shared tensors twice, as one piece for either part."""
        for rows in whole_tensors(self._source.scan(chunk_bytes), self._gate_of.__contains__):
            if rows.name not in self._gate_of:
                yield rows
                continue
            for name in (rows.name, self._gate_of[rows.name]):
                yield Rows(name, 0, rows.stop // 2, rows.raw)

    def decode(self, rows: Rows, start: int, stop: int) -> Floats:
        """Some of the rows that `scan` yielded."""
        if rows.name not in self._parts:
            return self._source.decode(rows, start, stop)
        (stored, part), width = self._parts[rows.name], self._head_dim
        first, last = start // width, -(-stop // width)
        both = Rows(stored, 0, 2 * rows.stop, rows.raw)
        whole_heads = self._source.decode(both, first * 2 * width, last * 2 * width)
        return self._cut(whole_heads, part)[start - first * width : stop - first * width]

    def _cut(self, values: Floats, part: int) -> Floats:
        """[heads * 2 * Dh, …] to the [heads * Dh, …] of one part."""
        by_head = values.reshape(-1, 2, self._head_dim, *values.shape[1:])
        return np.ascontiguousarray(by_head[:, part]).reshape(-1, *values.shape[1:])
