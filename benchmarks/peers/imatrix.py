"""llama.cpp's importance matrix: E[x^2] of each linear's inputs over calibration text, as llama-quantize reads it.

As llama-imatrix by default, it leaves the embedding and the LM head without. K input features.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.gguf_names import gguf_name
from toolkit.checkpoint.linears import Linear
from toolkit.checkpoint.weights import Tensors
from toolkit.reference.decoder import Array, Layer, embed, read_layer

Moments = dict[str, NDArray[np.float32]]


class _Recording(Layer):
    """A layer that adds up the squares of what each of its linears reads."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer.config, layer.anatomy, layer.tensors)
        self.squares: defaultdict[str, NDArray[np.float64] | float] = defaultdict(float)

    def product(self, linear: Linear, x: Array) -> Array:
        self.squares[linear.weight] = self.squares[linear.weight] + np.square(x, dtype=np.float64).sum(axis=0)
        return super().product(linear, x)


def second_moments(config: ModelConfig, source: Tensors, sequences: list[list[int]]) -> Moments:
    """E[x^2], float32 [K], by the weight's name in the checkpoint; one layer's weights in memory at a time."""
    tokens, moments = sum(map(len, sequences)), {}
    hidden = [embed(source, ids) for ids in sequences]
    for layer_index in range(config.num_hidden_layers):
        layer = _Recording(read_layer(config, source, layer_index))
        hidden = [layer(x) for x in hidden]
        for name, squares in layer.squares.items():
            moments[name] = np.asarray(squares / tokens, np.float32)
    return moments


def write_imatrix(path: Path, moments: Moments, chunks: int) -> None:
    """The file of one call for each of `chunks` pieces of text.

    Little-endian: int32 entries; for each int32 length, name, int32 calls, int32 K, float32 [K] of E[x^2] * calls;
    then int32 chunks, int32 length and name of the text (common_imatrix_load_legacy in llama.cpp's
    common/imatrix-loader.cpp, which divides by the calls).
    """
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(moments)))
        for name, values in moments.items():
            stored = gguf_name(name).encode()
            file.write(struct.pack("<i", len(stored)) + stored + struct.pack("<ii", chunks, values.size))
            file.write((values * np.float32(chunks)).astype("<f4").tobytes())
        file.write(struct.pack("<ii", chunks, 0))
