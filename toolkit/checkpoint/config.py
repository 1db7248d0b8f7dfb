"""`config.json` as Hugging Face writes it, resolved into facts no later floor has to guess.

Reads the form of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and of transformers 5
(`rope_parameters`, `dtype`). Fields carry the names of the file; what the family implies (biases, q/k norm,
which layers slide) is settled here, once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.files import read_json
from toolkit.names import CONFIG_FILE

FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn")
_MAX_CONFIG_BYTES: Final = 4 << 20


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding parameters; fields other than `rope_type` and `rope_theta` hold for the types that read them.

    `original_max_position_embeddings`, `low_freq_factor` and `high_freq_factor` belong to llama3; `attention_factor`,
    `beta_fast`, `beta_slow`, `mscale`, `mscale_all_dim`, `truncate` to yarn (arXiv 2309.00071).
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """One decoder's shape. `sliding_windows[i]` is layer i's window in tokens, itself included, or None.

    `head_dim` is the width heads are stored with, `rotary_head_dim` the width that RoPE and the attention's scale are
    computed from; they differ only where heads were padded for an operator (padded_heads.py).
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    rope: RopeConfig
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    @property
    def q_size(self) -> int:
        """Output features of q_proj: `num_attention_heads * head_dim`, which need not be `hidden_size`."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Output features of k_proj and v_proj."""
        return self.num_key_value_heads * self.head_dim


def read_config(folder: Path) -> ModelConfig:
    """The config of the checkpoint in `folder`.

    Raises CheckpointError if the file is missing, too large, not JSON or inconsistent, and UnsupportedError for a
    family or RoPE type outside `FAMILIES` and `ROPE_TYPES`.
    """
    path = folder / CONFIG_FILE
    return parse_config(read_checkpoint_json(path, _MAX_CONFIG_BYTES), path)


def read_checkpoint_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """A JSON object from a checkpoint's file of bounded size; raises CheckpointError with the file's name otherwise."""
    return read_json(path, max_bytes, CheckpointError, "a checkpoint folder in Hugging Face layout has one")


def parse_config(raw: Mapping[str, Any], path: Path) -> ModelConfig:
    """`raw` resolved; `path` appears in messages only. Raises as `read_config` does."""
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise UnsupportedError(
            f"{path}: model_type {model_type!r} is not supported, expected one of {', '.join(FAMILIES)}"
        )
    read = _Fields(raw, path)
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported, expected 'silu'")
    if raw.get("quantization_config") is not None:
        raise UnsupportedError(f"{path}: the checkpoint is already quantized, expected bf16, fp16 or fp32 weights")
    heads = read.count("num_attention_heads")
    hidden = read.count("hidden_size")
    default_head_dim = 128 if model_type == "qwen3" else hidden // heads
    head_dim = read.count("head_dim", default_head_dim)
    kv_heads = read.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"{path}: {heads} attention heads cannot share {kv_heads} key/value heads evenly")
    if head_dim % 2:
        raise CheckpointError(f"{path}: head_dim {head_dim} is odd, rotary embeddings need an even one")
    layers = read.count("num_hidden_layers")
    positions = read.count("max_position_embeddings")
    attention_bias = read.flag("attention_bias", default=False)
    return ModelConfig(
        model_type=model_type,
        hidden_size=hidden,
        intermediate_size=read.count("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rotary_head_dim=head_dim,
        vocab_size=read.count("vocab_size"),
        max_position_embeddings=positions,
        rms_norm_eps=read.positive("rms_norm_eps", 1e-6),
        tie_word_embeddings=read.flag("tie_word_embeddings", default=False),
        qkv_bias=model_type == "qwen2" or (attention_bias and model_type in ("llama", "qwen3")),
        o_bias=attention_bias and model_type in ("llama", "qwen3"),
        mlp_bias=model_type == "llama" and read.flag("mlp_bias", default=False),
        qk_norm=model_type == "qwen3",
        sliding_windows=_sliding_windows(read, model_type, layers),
        rope=_parse_rope(raw, path, positions),
        bos_token_id=read.token_id("bos_token_id"),
        eos_token_ids=read.token_ids("eos_token_id"),
        pad_token_id=read.token_id("pad_token_id"),
    )


class _Fields:
    """Typed reads from the raw object; every refusal names file, key, value and expectation."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self.raw = raw
        self.path = path

    def count(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 1 << 31:
            raise CheckpointError(f"{self.path}: {key} is {value!r}, expected a positive whole number")
        return value

    def positive(self, key: str, default: float) -> float:
        return _positive(self.raw.get(key, default), key, self.path)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {key} is {value!r}, expected true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.raw.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise CheckpointError(f"{self.path}: {key} is {value!r}, expected token ids")
        return tuple(ids)

    def token_id(self, key: str) -> int | None:
        ids = self.token_ids(key)
        return ids[0] if ids else None


def _positive(value: object, key: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise CheckpointError(f"{path}: {key} is {value!r}, expected a positive number")
    return float(value)


def _sliding_windows(read: _Fields, model_type: str, layers: int) -> tuple[int | None, ...]:
    """Which layers slide, as modeling_{mistral,qwen2,qwen3}.py of transformers decide it."""
    if read.raw.get("sliding_window") is None or model_type == "llama":
        return (None,) * layers
    window = read.count("sliding_window")
    if model_type in ("qwen2", "qwen3"):
        if not read.flag("use_sliding_window", default=False):
            return (None,) * layers
        kinds = read.raw.get("layer_types")
        if kinds is None:
            start = read.raw.get("max_window_layers", 28)
            return tuple(window if i >= start else None for i in range(layers))
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise CheckpointError(f"{read.path}: layer_types must name each of the {layers} layers")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return (window,) * layers


def _parse_rope(raw: Mapping[str, Any], path: Path, positions: int) -> RopeConfig:
    """RoPE from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (transformers 4)."""
    scaling = raw.get("rope_parameters", raw.get("rope_scaling")) or {}
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{path}: rope parameters are {scaling!r}, expected an object")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise UnsupportedError(f"{path}: rope_type {rope_type!r} is not supported, expected {', '.join(ROPE_TYPES)}")
    if raw.get("partial_rotary_factor", scaling.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        raise UnsupportedError(f"{path}: partial_rotary_factor is not supported, expected 1.0")

    def number(key: str, default: float | None = None) -> float:
        return _positive(scaling.get(key, default), f"rope {key}", path)

    def optional(key: str) -> float | None:
        return None if scaling.get(key) is None else number(key)

    theta = _positive(scaling.get("rope_theta", raw.get("rope_theta", 10000.0)), "rope_theta", path)
    if rope_type == "default":
        return RopeConfig(rope_theta=theta)
    if rope_type == "linear":
        return RopeConfig(rope_type, theta, factor=number("factor"))
    original = scaling.get("original_max_position_embeddings") or positions
    if isinstance(original, bool) or not isinstance(original, int) or original <= 0:
        raise CheckpointError(f"{path}: original_max_position_embeddings is {original!r}, expected a token count")
    if rope_type == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if low >= high:
            raise CheckpointError(f"{path}: rope low_freq_factor {low} must be below high_freq_factor {high}")
        return RopeConfig(rope_type, theta, number("factor"), original, low_freq_factor=low, high_freq_factor=high)
    return RopeConfig(
        rope_type,
        theta,
        number("factor"),
        original,
        attention_factor=optional("attention_factor"),
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=bool(scaling.get("truncate", True)),
    )
