"""Attention heads widened with zeros, for an operator that takes only multiples of some width.

Exact: a zero channel adds nothing to q·k, and a zero column of o_proj nothing to the output.

RoPE rotates channel i with i + Dh/2, so each half of a head is padded at its own end.
H heads, Dh true head width, Dp padded head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.anatomy import Decoder, decoder_of
from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.scan import Rows, whole_tensors
from toolkit.checkpoint.sublayers import Attention
from toolkit.checkpoint.weights import WeightSource
from toolkit.errors import UnsupportedError

Floats = NDArray[np.float32]


def pad_heads(checkpoint: Checkpoint, multiple: int) -> Checkpoint:
    """The checkpoint with `head_dim` rounded up to a multiple; itself where it is one already.

    Raises UnsupportedError with q/k norm, whose mean would count the zeros.
    """
    config, decoder = checkpoint.config, decoder_of(checkpoint.config)
    if config.head_dim % multiple == 0:
        return checkpoint
    if any(layer.attention.head_norms for layer in decoder.layers):
        raise UnsupportedError(f"head_dim {config.head_dim} is not a multiple of {multiple} and has a q/k norm")
    width = -(-config.head_dim // multiple) * multiple
    return replace(
        checkpoint,
        config=replace(config, head_dim=width),
        source=PaddedHeads(checkpoint.source, decoder, config.head_dim, width),
    )


class PaddedHeads:
    """A `WeightSource` over another; q, k, v and o projections come out padded, and whole."""

    def __init__(self, source: WeightSource, decoder: Decoder, head_dim: int, padded: int) -> None:
        self._source, self._head_dim, self._padded = source, head_dim, padded
        attentions = [layer.attention for layer in decoder.layers if isinstance(layer.attention, Attention)]
        self._rows_are_heads = {tensor for a in attentions for linear in a.qkv for tensor in linear.tensors}
        self._columns_are_heads = {attention.o_proj.weight for attention in attentions}
        self.identity, self.digests, self.names = source.identity, source.digests, source.names
        self.bytes_read = source.bytes_read

    def read(self, name: str) -> Floats:
        """A whole tensor in float32, its heads padded."""
        return self._pad(name, self._source.read(name))

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows [start, stop) of a tensor in float32, its heads padded."""
        return self.read(name)[start:stop]

    def scan(self, chunk_bytes: int) -> Iterator[Rows]:
        """As the source's, tensors that are padded as one piece each: models with heads so narrow are small."""
        for rows in whole_tensors(self._source.scan(chunk_bytes), self._is_padded):
            stop = rows.stop // self._head_dim * self._padded if rows.name in self._rows_are_heads else rows.stop
            yield replace(rows, stop=stop)

    def decode(self, rows: Rows, start: int, stop: int) -> Floats:
        """Some rows of a padded tensor."""
        if not self._is_padded(rows.name):
            return self._source.decode(rows, start, stop)
        true_stop = rows.stop // self._padded * self._head_dim if rows.name in self._rows_are_heads else rows.stop
        whole = self._source.decode(replace(rows, stop=true_stop), 0, true_stop)
        return self._pad(rows.name, whole)[start:stop]

    def _is_padded(self, name: str) -> bool:
        return name in self._rows_are_heads or name in self._columns_are_heads

    def _pad(self, name: str, values: Floats) -> Floats:
        if name in self._rows_are_heads:
            return self._pad_rows(values)
        return np.ascontiguousarray(self._pad_rows(values.T).T) if name in self._columns_are_heads else values

    def _pad_rows(self, values: Floats) -> Floats:
        """[H * Dh, …] to [H * Dp, …]."""
        rest = values.shape[1:]
        halves = values.reshape(-1, 2, self._head_dim // 2, *rest)
        padded = np.zeros((halves.shape[0], 2, self._padded // 2, *rest), np.float32)
        padded[:, :, : self._head_dim // 2] = halves
        return padded.reshape(-1, *rest)
