"""Gains of norms as they are multiplied, where a checkpoint has another number.

Where gains count from 1 they are 1 and the checkpoint's weight together. Where the embedding is multiplied by a factor,
the residual stream is computed in units of that factor, so that no graph multiplies by it and float16 holds what is in
the stream: what norms behind sublayers add is divided by it, and the others, which divide by the stream's size, take
their epsilon over its square (`ModelConfig.stream_eps`). Exact.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.scan import Rows
from toolkit.checkpoint.weights import WeightSource

Floats = NDArray[np.float32]


def with_gains(source: WeightSource, config: ModelConfig) -> WeightSource:
    """The source with the gains that are multiplied; itself where a checkpoint has these."""
    structure = config.structure
    return Gains(source, config) if structure.gains_from_one or structure.embedding_scale != 1.0 else source


class Gains:
    """A `WeightSource` over another, whose norms have the gains that are multiplied."""

    def __init__(self, source: WeightSource, config: ModelConfig) -> None:
        self._source, decoder = source, decoder_of(config)
        self._offset = np.float32(config.structure.gains_from_one)
        self._factors = {norm.weight: np.float32(1) for norm in decoder.norms}
        for layer in decoder.layers:
            for norm in layer.output_norms:
                self._factors[norm.weight] = np.float32(1 / config.structure.embedding_scale)
        self.names, self.identity, self.digests = source.names, source.identity, source.digests
        self.scan, self.bytes_read = source.scan, source.bytes_read

    def read(self, name: str) -> Floats:
        """Reads a whole tensor in float32."""
        return self._gains(name, self._source.read(name))

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows [start, stop) of a tensor in float32."""
        return self._gains(name, self._source.read_rows(name, start, stop))

    def decode(self, rows: Rows, start: int, stop: int) -> Floats:
        """Some of the rows that `scan` yielded."""
        return self._gains(rows.name, self._source.decode(rows, start, stop))

    def _gains(self, name: str, values: Floats) -> Floats:
        return (values + self._offset) * self._factors[name] if name in self._factors else values
