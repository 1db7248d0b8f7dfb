"""GGUF files: a checkpoint written for llama-quantize, and a quantized one read back as the reference's tensors.

What is written is for quantizing: it has no vocabulary and says nothing of RoPE scaling.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.tool import PeerError
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.gguf_names import gguf_form, gguf_name, rotated_heads, to_halves, to_neighbours
from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.safetensors import ITEM_BYTES
from toolkit.checkpoint.weights import FileWeights, expected_tensors
from toolkit.names import LM_HEAD, weight


def gguf_package() -> Any:
    """The `gguf` module. Raises PeerError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise PeerError("the gguf package is not installed, llama.cpp's files need it: pip install gguf") from None
    return gguf


def write_gguf(checkpoint: Checkpoint, path: Path) -> None:
    """Every tensor, exact: matrices in their stored dtype, vectors as float32 (llama.cpp wants those so).

    One tensor is in memory at a time.
    """
    gguf, config = gguf_package(), checkpoint.config
    writer = gguf.GGUFWriter(path, _architecture(config))
    _add_shape(writer, config)
    shapes = expected_tensors(config)
    for name, shape in shapes.items():
        dtype = _stored_dtype(checkpoint, name, shape)
        raw = gguf.GGMLQuantizationType[dtype]
        nbytes = ITEM_BYTES[dtype] * int(np.prod(shape))
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), nbytes, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():
        values = checkpoint.source.read(name)
        if heads := rotated_heads(config, name):
            values = to_neighbours(values, heads)
        writer.write_tensor_data(_narrow(values, _stored_dtype(checkpoint, name, shape)))
    writer.close()


def write_random_gguf(config: ModelConfig, path: Path) -> None:
    """A file of a config's shape that says nothing, for speed alone: matrices as llama-quantize's Q4_0 has them, the
    head in Q6_K, of random integers under one small scale; norms of ones, biases of zeros."""
    gguf, random = gguf_package(), np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, _architecture(config))
    _add_shape(writer, config)
    types, shapes = gguf.GGMLQuantizationType, expected_tensors(config)
    of = {name: _random_type(name, shape) for name, shape in shapes.items()}
    nbytes = {}
    for name, shape in shapes.items():
        values, size = gguf.GGML_QUANT_SIZES[types[of[name]]]
        nbytes[name] = int(np.prod(shape)) // values * size
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), nbytes[name], raw_dtype=types[of[name]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.write_tensor_data(np.full(shape, 0 if name.endswith(".bias") else 1, np.float32))
            continue
        _, size = gguf.GGML_QUANT_SIZES[types[of[name]]]
        blocks = random.integers(0, 256, (nbytes[name] // size, size), np.uint8)
        # The scale is a block's first number in Q4_0, its last in Q6_K.
        at = slice(0, 2) if of[name] == "Q4_0" else slice(size - 2, size)
        blocks[:, at] = np.array([2e-4 if of[name] == "Q6_K" else 4e-3], "<f2").view(np.uint8)
        writer.write_tensor_data(blocks.reshape(-1))
    writer.close()


class GGUFWeights:
    """`Tensors` of a GGUF file, dequantized as the `gguf` package does it, under the checkpoint's names."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._gguf, self.config = gguf_package(), config
        tensors = {tensor.name: tensor for tensor in self._gguf.GGUFReader(path).tensors}
        self._shapes = expected_tensors(config)
        self._tensors = {name: tensors[gguf_name(name)] for name in self._shapes}

    def names(self) -> list[str]:
        """Every tensor the config calls for."""
        return list(self._tensors)

    def read(self, name: str) -> NDArray[np.float32]:
        """Reads a whole tensor as float32, dequantized."""
        values = self._dequantized(name, self._tensors[name].data)
        heads = rotated_heads(self.config, name)
        return to_halves(values, heads) if heads else values

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of a tensor: blocks never cross them."""
        if rotated_heads(self.config, name):
            return self.read(name)[start:stop]
        return self._dequantized(name, self._tensors[name].data[start:stop])

    def matrix_bytes(self) -> int:
        """What the matrices take in the file, scales included."""
        return sum(int(self._tensors[name].n_bytes) for name in self._matrices())

    def formats(self) -> Counter[str]:
        """How many matrices have each of llama.cpp's types."""
        return Counter(self._tensors[name].tensor_type.name for name in self._matrices())

    def _matrices(self) -> list[str]:
        return [name for name, shape in self._shapes.items() if len(shape) == 2]

    def _dequantized(self, name: str, data: NDArray[Any]) -> NDArray[np.float32]:
        values = self._gguf.dequantize(data, self._tensors[name].tensor_type)
        return np.asarray(values, np.float32).reshape(-1, *self._shapes[name][1:])


def _architecture(config: ModelConfig) -> str:
    """llama.cpp's name of a config's family. Raises PeerError if it has none."""
    form = gguf_form(config)
    if form is None:
        raise PeerError(f"no GGUF file is known to be of {config.model_type}'s architecture")
    return form.architecture


def _add_shape(writer: Any, config: ModelConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _random_type(name: str, shape: tuple[int, ...]) -> str:
    if len(shape) == 1:
        return "F32"
    return "Q6_K" if name == weight(LM_HEAD) else "Q4_0"


def _stored_dtype(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> str:
    if len(shape) == 1 or not isinstance(checkpoint.source, FileWeights):
        return "F32"
    return checkpoint.source.dtype(name)


def _narrow(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Back to the dtype the values were widened from, so exact."""
    if dtype == "BF16":
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2")
    return values.astype("<f2" if dtype == "F16" else "<f4")
