"""A checkpoint in a rotated residual stream and with rotated values: the same function, weights without outliers.

QuaRot's R1 and R2 (arXiv 2404.00456, section 4): hidden states h become h Q, and the values v of a head become v P,
with randomized Hadamard matrices Q and P. Gains of the norms go into the linears that read them first, since only a
norm without gains commutes with a rotation. What writes into the stream is rotated along its rows, what reads from it
along its columns; attention's weights add up to one, so a bias of v turns along.
D hidden, Dh head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.hadamard import Hadamard, is_known
from toolkit.checkpoint.linear_inputs import linear_inputs
from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.scan import Rows
from toolkit.checkpoint.weights import WeightSource
from toolkit.errors import UnsupportedError

Floats = NDArray[np.float32]
_WRITERS: Final = ("o_proj", "down_proj")
_SALIENT: Final = 8.0


def salient_inputs(checkpoint: Checkpoint) -> list[str]:
    """Norms with gains many times their median, by the linear that reads them first: where such channels are read,
    rounding without data does harm."""
    found = []
    for given in linear_inputs(checkpoint.config):
        for writer in given.writers:
            if "norm" in writer:
                gains = np.abs(checkpoint.source.read(writer))
                if float(gains.max()) >= _SALIENT * float(np.median(gains)):
                    found.append(given.name)
    return found


def can_rotate(config: ModelConfig) -> bool:
    """Whether `rotate` takes a checkpoint of this config."""
    return not config.tie_word_embeddings and is_known(config.hidden_size) and is_known(config.head_dim)


def rotate(checkpoint: Checkpoint, seed: int = 0) -> Checkpoint:
    """The checkpoint rotated. Raises UnsupportedError for a tied embedding, or a width without a Hadamard matrix."""
    if checkpoint.config.tie_word_embeddings:
        raise UnsupportedError(
            "a tied embedding cannot be rotated: the final norm's gains stand on one side of it only; set rotate=false"
        )
    source = RotatedTensors(checkpoint.source, checkpoint.config, seed)
    return replace(checkpoint, source=source)


class RotatedTensors:
    """A `WeightSource` over another. Rows of o_proj, down_proj and v_proj mix, so these come whole."""

    def __init__(self, source: WeightSource, config: ModelConfig, seed: int) -> None:
        self._source, self._head_dim = source, config.head_dim
        self._hidden, self._head = Hadamard(config.hidden_size, seed), Hadamard(config.head_dim, seed + 1)
        self.identity, self.digests, self.names = source.identity, source.digests, source.names
        # Matrices whose rows mix, while a streaming pass takes them piece by piece.
        self._whole: dict[str, Floats] = {}

    def read(self, name: str) -> Floats:
        """A whole tensor, rotated."""
        return self._rotated(name, self._source.read(name))

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows of a rotated tensor."""
        if _mixes_rows(name):
            return self.read(name)[start:stop]
        return self._rotated(name, self._source.read_rows(name, start, stop))

    def scan(self, chunk_bytes: int) -> Iterator[Rows]:
        """As the source's, but for tensors whose rows mix: those are to be read anew."""
        name, stop = "", 0
        for rows in self._source.scan(chunk_bytes):
            if name and rows.name != name:
                yield Rows(name, 0, stop, None)
                name = ""
            if _mixes_rows(rows.name):
                rows.release()
                name, stop = rows.name, rows.stop
            else:
                yield rows
        if name:
            yield Rows(name, 0, stop, None)

    def decode(self, rows: Rows, start: int, stop: int) -> Floats:
        """Some rows of a rotated tensor; of one that comes whole its last rows are asked for last."""
        if not _mixes_rows(rows.name):
            return self._rotated(rows.name, self._source.decode(rows, start, stop))
        if rows.name not in self._whole:
            self._whole[rows.name] = self.read(rows.name)
        whole = self._whole.pop(rows.name) if stop == rows.stop else self._whole[rows.name]
        return whole[start:stop]

    def _rotated(self, name: str, values: Floats) -> Floats:
        role = names.role_of(name)
        if role.endswith("layernorm") or name == names.weight(names.FINAL_NORM):
            return np.ones_like(values)
        if role == "v_proj":
            values = _along_rows(self._head, values, self._head_dim)
        elif role in _WRITERS:
            values = _along_rows(self._hidden, values, values.shape[0])
        if not name.endswith(".weight") or values.ndim < 2:
            return values
        if role == "o_proj":
            heads = values.reshape(values.shape[0], -1, self._head_dim)
            return self._head.apply(heads).reshape(values.shape)
        if role == "down_proj":
            return values
        gains = self._norm_before(name)
        return self._hidden.apply(values if gains is None else values * gains)

    def _norm_before(self, name: str) -> Floats | None:
        """The gains of the norm that a linear reads; none before the embedding."""
        role = names.role_of(name)
        if role == "embed_tokens":
            return None
        if role == "lm_head":
            return self._source.read(names.weight(names.FINAL_NORM))
        norm = "input_layernorm" if role in names.QKV_PROJECTIONS else "post_attention_layernorm"
        layer_index = names.layer_of(name)
        assert layer_index is not None
        return self._source.read(names.weight(names.layer_module(layer_index, norm)))


def _mixes_rows(name: str) -> bool:
    return names.role_of(name) in (*_WRITERS, "v_proj")


def _along_rows(matrix: Hadamard, values: Floats, width: int) -> Floats:
    """Q' of each `width` rows [n * width, …]; a bias is a vector of them."""
    if values.ndim == 1:
        return matrix.apply(values.reshape(-1, width)).reshape(values.shape)
    turned = matrix.apply(np.ascontiguousarray(values.T).reshape(values.shape[1], -1, width))
    return np.ascontiguousarray(turned.reshape(values.shape[1], -1).T)
