"""Heads of which RoPE turns a part, in an order of channels in which it turns pairs of halves, as in a whole head.

Of a head's Dh channels RoPE turns the first R, pair (i, i + R/2), and leaves the others. Its halves become [turned
R/2 | left (Dh - R)/2] each, so that pairs are (i, i + Dh/2) everywhere and those behind R/2 have the angle 0: what any
operator of RoPE computes. Exact, since q and k change in the same way and attention sees their products alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.scan import Rows, whole_tensors
from toolkit.checkpoint.sublayers import Attention
from toolkit.checkpoint.weights import WeightSource

Floats = NDArray[np.float32]


def in_halves(source: WeightSource, config: ModelConfig) -> WeightSource:
    """The source with the channels of q and k in that order; itself where RoPE turns whole heads."""
    partial = config.rotary_head_dim < config.head_dim and config.structure.latent is None
    return PartialRotary(source, config) if partial else source


def order_of_channels(head_dim: int, turned: int) -> NDArray[np.int64]:
    """Returns which channel of a head as it is stored becomes each channel, of `turned` ones that stand first."""
    first, left = np.arange(turned), np.arange(turned, head_dim)
    return np.concatenate([half for pair in zip(np.split(first, 2), np.split(left, 2), strict=True) for half in pair])


class PartialRotary:
    """A `WeightSource` over another. Rows of q_proj and k_proj change places within a head; they are scanned whole."""

    def __init__(self, source: WeightSource, config: ModelConfig) -> None:
        self._source, self._head_dim = source, config.head_dim
        self._order = order_of_channels(config.head_dim, config.rotary_head_dim)
        self._turned: set[str] = set()
        for layer in decoder_of(config).layers:
            if isinstance(attention := layer.attention, Attention):
                self._turned |= attention.q_proj.tensors.keys() | attention.k_proj.tensors.keys()
                self._turned |= {norm.weight for norm in attention.head_norms}
        self.names, self.identity, self.digests = source.names, source.identity, source.digests
        self.bytes_read = source.bytes_read

    def read(self, name: str) -> Floats:
        """Reads a whole tensor in float32."""
        return self._ordered(name, self._source.read(name))

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows [start, stop) of a tensor in float32."""
        if name not in self._turned:
            return self._source.read_rows(name, start, stop)
        first, last = start // self._head_dim * self._head_dim, -(-stop // self._head_dim) * self._head_dim
        return self._ordered(name, self._source.read_rows(name, first, last))[start - first : stop - first]

    def scan(self, chunk_bytes: int) -> Iterator[Rows]:
        """As the source's, tensors whose rows change places as one piece each."""
        return whole_tensors(self._source.scan(chunk_bytes), self._turned.__contains__)

    def decode(self, rows: Rows, start: int, stop: int) -> Floats:
        """Some of the rows that `scan` yielded."""
        if rows.name not in self._turned:
            return self._source.decode(rows, start, stop)
        first, last = start // self._head_dim * self._head_dim, -(-stop // self._head_dim) * self._head_dim
        return self._ordered(rows.name, self._source.decode(rows, first, last))[start - first : stop - first]

    def _ordered(self, name: str, values: Floats) -> Floats:
        if name not in self._turned:
            return values
        heads = values.reshape(-1, self._head_dim, *values.shape[1:])
        return np.ascontiguousarray(heads[:, self._order]).reshape(values.shape)
