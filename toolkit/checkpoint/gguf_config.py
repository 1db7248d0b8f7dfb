"""A GGUF file's metadata as the config.json and generation_config.json that its checkpoint would have.

Keys are Hugging Face's, so that everything that reads a checkpoint reads this one (llama.cpp's conversion/base.py
writes the metadata from the same keys).
D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, TypedDict

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.gguf_metadata import Metadata
from toolkit.checkpoint.gguf_names import ROPE_FREQS, families_by_architecture
from toolkit.checkpoint.safetensors import TensorRef
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.typed_json import Json

# What changes a model's function and has no key in the families that are read; the value at which it does not.
_MUST_BE: Final = {
    ".expert_count": 0,
    ".attention.sliding_window": 0,
    ".attention.scale": 0,
    ".logit_scale": 0,
    ".residual_scale": 0,
    ".embedding_scale": 0,
    ".attn_logit_softcapping": 0,
    ".final_logit_softcapping": 0,
    ".attention.temperature_scale": 0,
}
_SAMPLING: Final = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
# Llama 3's published original length: only its ratios to two wavelengths are in a file's factors.
_LLAMA3_LENGTH: Final = 8192
_SAME: Final = 1e-4


class RopeScaling(TypedDict, total=False):
    """config.json's `rope_scaling`; `rope_type` says which of the other keys there are."""

    rope_type: str
    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    low_freq_factor: float
    high_freq_factor: float


def config_of(
    read: Metadata, tensors: Mapping[str, TensorRef], rope_freqs: NDArray[np.float32] | None
) -> Mapping[str, Json]:
    """The config.json; `rope_freqs` [D/2] are the divisors of inverse frequencies, if the file has any.

    Raises UnsupportedError for an architecture, or a part of one, that no family has.
    """
    families = families_by_architecture()
    if read.architecture not in families:
        raise UnsupportedError(
            f"{read.path}: general.architecture {read.architecture[:40]!r} is not supported, expected one of "
            f"{', '.join(families)}"
        )
    _check_plain(read)
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{read.path} has no token_embd.weight: it is a vocabulary, or a part of a split file")
    hidden, heads = read.count(".embedding_length"), read.count(".attention.head_count")
    head_dim = read.count(".attention.key_length", hidden // heads)
    if read.count(".attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(f"{read.path}: values of attention are not as wide as its keys, {head_dim}")
    theta = read.number(".rope.freq_base", 10000.0)
    return {
        "architectures": ["from a GGUF file"],
        "model_type": families[read.architecture].model_type,
        "hidden_size": hidden,
        "intermediate_size": read.count(".feed_forward_length"),
        "num_hidden_layers": read.count(".block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.count(".attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": read.count(".context_length"),
        "rms_norm_eps": read.number(".attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "use_sliding_window": False,
        "sliding_window": None,
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(read, head_dim, theta, rope_freqs),
        "partial_rotary_factor": read.count(".rope.dimension_count", head_dim) / head_dim,
        **_special_ids(read),
    }


def generation_of(read: Metadata) -> Mapping[str, Json]:
    """The generation_config.json: ids that end an answer, and how the file wants text to be sampled."""
    ends = [
        read.count(f"tokenizer.ggml.{name}_token_id", least=0)
        for name in ("eos", "eot", "eom")
        if read.has(f"tokenizer.ggml.{name}_token_id")
    ]
    ids = {**_special_ids(read), "eos_token_id": list(dict.fromkeys(ends)) or None}
    sampling: dict[str, float | bool] = {key: read.number(name) for key, name in _SAMPLING.items() if read.has(name)}
    if read.has("general.sampling.top_k"):
        sampling["top_k"] = read.count("general.sampling.top_k", least=0)
    if sampling:
        sampling["do_sample"] = sampling.get("temperature", 1.0) > 0
    return {key: value for key, value in {**ids, **sampling}.items() if value is not None}


def _special_ids(read: Metadata) -> dict[str, int | None]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    keys = {key: f"tokenizer.ggml.{name}_token_id" for key, name in names.items()}
    return {key: read.count(name, least=0) if read.has(name) else None for key, name in keys.items()}


def _check_plain(read: Metadata) -> None:
    """Raises UnsupportedError for what changes the function and is no part of any family that is read."""
    for key, plain in _MUST_BE.items():
        if read.has(key) and (value := read.number(key)) != plain:
            raise UnsupportedError(
                f"{read.path}: {read.architecture}{key} is {value:g}, which no family that is read has: convert the "
                "original checkpoint"
            )


def _rope_scaling(
    read: Metadata, head_dim: int, theta: float, rope_freqs: NDArray[np.float32] | None
) -> RopeScaling | None:
    kind = read.text(".rope.scaling.type", "none")
    if rope_freqs is not None:
        return _llama3(read, head_dim, theta, rope_freqs.astype(np.float64))
    if kind == "none":
        # Old files have linear scaling under a name of its own.
        scale = read.number(".rope.scale_linear", 1.0)
        return None if scale == 1.0 else {"rope_type": "linear", "factor": scale}
    if kind == "linear":
        return {"rope_type": "linear", "factor": read.number(".rope.scaling.factor")}
    if kind != "yarn":
        raise UnsupportedError(
            f"{read.path}: rope.scaling.type {kind[:40]!r} is not supported, expected linear or yarn"
        )
    return _yarn(read)


def _yarn(read: Metadata) -> RopeScaling:
    factor = read.number(".rope.scaling.factor")
    found: RopeScaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": read.count(".rope.scaling.original_context_length"),
    }
    if read.has(".rope.scaling.yarn_beta_fast"):
        found["beta_fast"] = read.number(".rope.scaling.yarn_beta_fast")
    if read.has(".rope.scaling.yarn_beta_slow"):
        found["beta_slow"] = read.number(".rope.scaling.yarn_beta_slow")
    if read.has(".rope.scaling.attn_factor"):
        # The converter writes HF's attention_factor and its attn_factor there, which transformers does not read. What
        # takes back YaRN's own factor is the latter, of DeepSeek-R1-0528-Qwen3-8B.
        given, own = read.number(".rope.scaling.attn_factor"), 0.1 * math.log(factor) + 1.0
        if abs(given * own - 1.0) > _SAME and given != 1.0:
            found["attention_factor"] = given
    return found


def _llama3(read: Metadata, head_dim: int, theta: float, divisors: NDArray[np.float64]) -> RopeScaling:
    """Llama3's parameters from what they make of each inverse frequency.

    A wavelength below a first limit is left, one beyond a second is divided by `factor`, and between them 1/divisor is
    linear in 1/wavelength; only the limits' ratios to the original length matter. Raises UnsupportedError for divisors
    that no parameters make, such as LongRoPE's.
    """
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    factor = float(divisors.max(initial=1.0))
    if divisors.shape != wavelengths.shape or factor < 1.0:
        raise UnsupportedError(f"{read.path}: {ROPE_FREQS} is {list(divisors.shape)}, expected [{head_dim // 2}]")
    if factor == 1.0:
        return {"rope_type": "default"}
    length = read.count(".rope.scaling.original_context_length", _LLAMA3_LENGTH)
    for low, high in ((1.0, 4.0), _fitted(divisors, wavelengths, factor, length)):
        if low < high and np.allclose(_llama3_divisors(wavelengths, factor, length, low, high), divisors, rtol=_SAME):
            return {
                "rope_type": "llama3",
                "factor": round(factor, 4),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
    raise UnsupportedError(
        f"{read.path}: {ROPE_FREQS} holds what is no RoPE of Llama 3: convert the original checkpoint"
    )


def _fitted(
    divisors: NDArray[np.float64], wavelengths: NDArray[np.float64], factor: float, length: int
) -> tuple[float, float]:
    """low_freq_factor and high_freq_factor by the line that those between the limits lie on; equal where too few do."""
    between = (divisors > 1.0 + _SAME) & (divisors < factor * (1.0 - _SAME))
    if between.sum() < 2:
        return 1.0, 1.0
    smooth = (1.0 / divisors[between] - 1.0 / factor) / (1.0 - 1.0 / factor)
    slope, offset = np.polyfit(length / wavelengths[between], smooth, 1)
    return (round(float(-offset / slope), 3), round(float((1.0 - offset) / slope), 3)) if slope > 0 else (1.0, 1.0)


def _llama3_divisors(
    wavelengths: NDArray[np.float64], factor: float, length: int, low: float, high: float
) -> NDArray[np.float64]:
    """What Llama 3 divides inverse frequencies by (_compute_llama3_parameters in transformers)."""
    smooth = np.clip((length / wavelengths - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)
