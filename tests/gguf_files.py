"""GGUF files for tests, written byte by byte as the format's description has it, sound or not."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Names of tensors as llama.cpp's gguf-py/gguf/constants.py spells them.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ALIGNMENT = 32


@dataclass
class Stored:
    """A tensor as it lies in a file: the number of its type, its shape outermost first, and its bytes."""

    type_number: int
    shape: tuple[int, ...]
    raw: bytes


@dataclass
class GgufFile:
    """What a file says; `write` lays it out. A test changes what it wants to be wrong."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]
    version: int = 3
    magic: bytes = b"GGUF"
    alignment: int = ALIGNMENT
    claimed_tensors: int | None = None
    claimed_keys: int | None = None
    offsets: dict[str, int] = field(default_factory=dict)

    def header(self) -> bytes:
        """Everything before the data, without padding."""
        tensors = len(self.tensors) if self.claimed_tensors is None else self.claimed_tensors
        keys = len(self.metadata) if self.claimed_keys is None else self.claimed_keys
        made = self.magic + struct.pack("<IQQ", self.version, tensors, keys)
        for key, value in self.metadata.items():
            made += text(key) + typed(value)
        at = 0
        for name, stored in self.tensors.items():
            made += text(name) + struct.pack("<I", len(stored.shape))
            made += b"".join(struct.pack("<Q", length) for length in reversed(stored.shape))
            made += struct.pack("<IQ", stored.type_number, self.offsets.get(name, at))
            at += len(stored.raw) + -len(stored.raw) % self.alignment
        return made

    def content(self) -> bytes:
        """The whole file."""
        made = self.header()
        made += bytes(-len(made) % self.alignment)
        for stored in self.tensors.values():
            made += stored.raw + bytes(-len(stored.raw) % self.alignment)
        return made

    def write(self, path: Path) -> Path:
        """Writes the file and returns its path."""
        path.write_bytes(self.content())
        return path


def text(value: str) -> bytes:
    """A string: length, then UTF-8."""
    encoded = value.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def typed(value: Any) -> bytes:
    """A value with its type before it; `bytes` stand as they are."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, list):
        number, elements = _kind(value[0]), b"".join(_bare(element) for element in value)
        return struct.pack("<IIQ", 9, number, len(value)) + elements
    return struct.pack("<I", _kind(value)) + _bare(value)


def _kind(value: Any) -> int:
    return {bool: 7, int: 5, float: 6, str: 8}[type(value)]


def _bare(value: Any) -> bytes:
    if isinstance(value, str):
        return text(value)
    return struct.pack({bool: "<?", int: "<i", float: "<f"}[type(value)], value)


def f32(values: NDArray[np.float32]) -> Stored:
    """An array as float32."""
    return Stored(0, values.shape, np.ascontiguousarray(values, np.float32).tobytes())


def permuted(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """LlamaModel.permute of llama.cpp's converter."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def stored_name(name: str) -> str:
    """llama.cpp's name of a checkpoint's tensor."""
    module, kind = name.rsplit(".", 1)
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{kind}"
    _, _, index, inner = module.split(".", 3)
    return f"blk.{index}.{NAMES[inner]}.{kind}"


def byte_vocabulary(size: int) -> dict[str, Any]:
    """A vocabulary of bytes and merges, filled up to `size` with unused tokens: metadata of `tokenizer.ggml`."""
    tokens = [bytes_to_unicode()[k] for k in range(256)][: size - 3]
    merges = ["t h", "th e"] if size > 300 else []
    tokens += ["th", "the"] if merges else []
    special = ["<|begin|>", "<|end|>"]
    pads = [f"[PAD{k}]" for k in range(size - len(tokens) - len(special))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*tokens, *special, *pads],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 3] + [5] * len(pads),
        "tokenizer.ggml.merges": merges or [f"{tokens[0]} {tokens[1]}"],
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
    }


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's letters for bytes (openai/gpt-2, encoder.py)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + k) for k, b in enumerate(hidden)}


def from_checkpoint(folder: Path) -> GgufFile:
    """A checkpoint in Hugging Face layout, as llama.cpp's converter writes one in float32."""
    import torch
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    arch = "llama" if config["model_type"] == "mistral" else config["model_type"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    tied, tensors = config.get("tie_word_embeddings", False), dict[str, Stored]()
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.to(torch.float32).numpy()
        if arch in ("llama", "smollm3") and ".q_proj." in name:
            values = permuted(values, heads)
        if arch in ("llama", "smollm3") and ".k_proj." in name:
            values = permuted(values, kv_heads)
        if not (tied and name == "lm_head.weight"):
            tensors[stored_name(name)] = f32(values)
    metadata: dict[str, Any] = {
        "general.architecture": arch,
        "general.file_type": 0,
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": kv_heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.freq_base": config.get("rope_theta", 10000.0),
        f"{arch}.rope.dimension_count": head_dim,
        **byte_vocabulary(config["vocab_size"]),
    }
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", "default")
    if kind == "llama3":
        tensors["rope_freqs.weight"] = f32(_llama3_factors(scaling, config.get("rope_theta", 10000.0), head_dim))
        metadata[f"{arch}.rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    elif kind in ("linear", "yarn"):
        metadata |= {f"{arch}.rope.scaling.type": kind, f"{arch}.rope.scaling.factor": float(scaling["factor"])}
        if kind == "yarn":
            metadata[f"{arch}.rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    return GgufFile(metadata, tensors)


def _llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> NDArray[np.float32]:
    """LlamaModel.generate_extra_tensors of llama.cpp's converter."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    old, factors = scaling["original_max_position_embeddings"], []
    for frequency in (1.0 / theta ** (k / head_dim) for k in range(0, head_dim, 2)):
        wavelength = 2 * math.pi / frequency
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(scaling["factor"])
        else:
            smooth = (old / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)
