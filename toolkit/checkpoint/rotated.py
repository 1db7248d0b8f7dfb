"""A checkpoint in a rotated residual stream and with rotated values: the same function, weights without outliers.

QuaRot's R1 and R2 (arXiv 2404.00456, section 4): hidden states h become h Q, and the values v of a head become v P,
with randomized Hadamard matrices Q and P. Gains of the norms go into the linears that read them first, since only a
norm without gains commutes with a rotation. What writes into the stream is rotated along its rows, what reads from it
along its columns; attention's weights add up to one, so a bias of v turns along.
D hidden, Dh head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.anatomy import Decoder, decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.hadamard import Hadamard, is_known
from toolkit.checkpoint.linears import Norm
from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.scan import Rows, whole_tensors
from toolkit.checkpoint.sublayers import Attention
from toolkit.checkpoint.weights import WeightSource
from toolkit.errors import UnsupportedError

Floats = NDArray[np.float32]
_SALIENT: Final = 8.0


def salient_inputs(checkpoint: Checkpoint) -> list[str]:
    """Norms with gains many times their median, by the linear that reads them first: where such channels are read,
    rounding without data does harm."""
    found = []
    for given in decoder_of(checkpoint.config).inputs:
        if isinstance(given.writer, Norm):
            gains = np.abs(checkpoint.source.read(given.writer.weight))
            if float(gains.max()) >= _SALIENT * float(np.median(gains)):
                found.append(given.name)
    return found


def can_rotate(config: ModelConfig) -> bool:
    """Whether `rotate` takes a checkpoint of this config."""
    widths = [config.hidden_size, *([config.head_dim] if _turns_values(config) else [])]
    return not config.tie_word_embeddings and not config.structure.output_norms and all(map(is_known, widths))


def _turns_values(config: ModelConfig) -> bool:
    """Whether values are rotated: neither those made of a latent, nor those whose mean is gated channel by channel."""
    return config.structure.latent is None and not config.structure.output_gate


def rotate(checkpoint: Checkpoint, seed: int = 0) -> Checkpoint:
    """The checkpoint rotated. Raises UnsupportedError for a tied embedding, or a width without a Hadamard matrix."""
    if checkpoint.config.tie_word_embeddings:
        raise UnsupportedError(
            "a tied embedding cannot be rotated: the final norm's gains stand on one side of it only; set rotate=false"
        )
    if checkpoint.config.structure.output_norms:
        raise UnsupportedError(
            f"{checkpoint.config.model_type} has norms behind its sublayers, whose gains no rotation goes through: "
            "set rotate=false"
        )
    source = RotatedTensors(checkpoint.source, checkpoint.config, seed)
    return replace(checkpoint, source=source)


@dataclass(frozen=True)
class _Turn:
    """What is done to one tensor, in this order: `rows` mixes its rows, `gains` are a norm's that its columns take up,
    and `columns` mixes its columns."""

    rows: Hadamard | None = None
    gains: str | None = None
    columns: Hadamard | None = None


def _turns(decoder: Decoder, stream: Hadamard, values: Hadamard | None) -> dict[str, _Turn]:
    """Returns the turn of every tensor that has one: what writes into the residual stream or reads from it, and, for
    the values of attention, v_proj and o_proj. Where `values` is None they stay as they are."""
    turns = {decoder.embedding.weight: _Turn(columns=stream)}
    turns |= {linear.weight: _Turn(None, decoder.norm.weight, stream) for linear in decoder.head_input.linears}
    for layer in decoder.layers:
        for half in layer.sublayers:
            turns |= {linear.weight: _Turn(None, half.norm.weight, stream) for linear in half.first}
            turns |= {tensor: _Turn(rows=stream) for linear in half.writers for tensor in linear.tensors}
        if not isinstance(layer.attention, Attention) or values is None:
            continue
        v, o = layer.attention.v_proj, layer.attention.o_proj
        turns |= {tensor: replace(turns.get(tensor, _Turn()), rows=values) for tensor in v.tensors}
        turns[o.weight] = replace(turns[o.weight], columns=values)
    return turns


class RotatedTensors:
    """A `WeightSource` over another. Rows of o_proj, down_proj and v_proj mix, so these come whole."""

    def __init__(self, source: WeightSource, config: ModelConfig, seed: int) -> None:
        decoder = decoder_of(config)
        self._source = source
        values = Hadamard(config.head_dim, seed + 1) if _turns_values(config) else None
        self._turns = _turns(decoder, Hadamard(config.hidden_size, seed), values)
        # Their gains stand in the linears behind them.
        self._emptied = {half.norm.weight for layer in decoder.layers for half in layer.sublayers}
        self._emptied.add(decoder.norm.weight)
        self.identity, self.digests, self.names = source.identity, source.digests, source.names
        self.bytes_read = source.bytes_read
        self._gains: dict[str, Floats] = {}
        # Matrices whose rows mix, while a streaming pass takes them piece by piece.
        self._whole: dict[str, Floats] = {}

    def read(self, name: str) -> Floats:
        """A whole tensor in float32, rotated."""
        return self._rotated(name, self._source.read(name))

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows [start, stop) of a tensor in float32, rotated."""
        if self._mixes_rows(name):
            return self.read(name)[start:stop]
        return self._rotated(name, self._source.read_rows(name, start, stop))

    def scan(self, chunk_bytes: int) -> Iterator[Rows]:
        """As the source's, tensors whose rows mix as one piece each."""
        return whole_tensors(self._source.scan(chunk_bytes), self._mixes_rows)

    def decode(self, rows: Rows, start: int, stop: int) -> Floats:
        """Some rows of a rotated tensor; of one that comes whole its last rows are asked for last."""
        if not self._mixes_rows(rows.name):
            return self._rotated(rows.name, self._source.decode(rows, start, stop))
        if rows.name not in self._whole:
            self._whole[rows.name] = self._rotated(rows.name, self._source.decode(rows, 0, rows.stop))
        whole = self._whole.pop(rows.name) if stop == rows.stop else self._whole[rows.name]
        return whole[start:stop]

    def _mixes_rows(self, name: str) -> bool:
        return name in self._turns and self._turns[name].rows is not None

    def _rotated(self, name: str, values: Floats) -> Floats:
        if name in self._emptied:
            return np.ones_like(values)
        turn = self._turns.get(name, _Turn())
        if turn.rows:
            values = _along_rows(turn.rows, values)
        if turn.gains:
            values = values * self._gain(turn.gains)
        return _along_columns(turn.columns, values) if turn.columns else values

    def _gain(self, name: str) -> Floats:
        """A norm's gains, read once: every piece of a matrix asks for them."""
        if name not in self._gains:
            self._gains[name] = self._source.read(name)
        return self._gains[name]


def _along_columns(matrix: Hadamard, values: Floats) -> Floats:
    """w Q of each stretch w of a row [rows, n * Q's order]."""
    return matrix.apply(values.reshape(values.shape[0], -1, matrix.order)).reshape(values.shape)


def _along_rows(matrix: Hadamard, values: Floats) -> Floats:
    """Q' of each stretch of rows [n * Q's order, …]; a bias is a vector of them."""
    if values.ndim == 1:
        return matrix.apply(values.reshape(-1, matrix.order)).reshape(values.shape)
    turned = matrix.apply(np.ascontiguousarray(values.T).reshape(values.shape[1], -1, matrix.order))
    return np.ascontiguousarray(turned.reshape(values.shape[1], -1).T)
