"""Gemma 3's decoder (270M, 1B): gains that count from 1, a norm behind each sublayer too, five layers of six over a
window of the text with a RoPE of their own, GELU. modeling_gemma3.py of transformers."""

from __future__ import annotations

import math

from toolkit.checkpoint.family import GELU_TANH, LAYER_KINDS, Family, Structure
from toolkit.checkpoint.fields import Fields, positive
from toolkit.errors import UnsupportedError


def _structure(read: Fields, layers: int) -> Structure:
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if read.get(key) not in (None, False):
            raise UnsupportedError(f"{read.path}: {key} is {read.get(key)!r:.40}, which is not supported")
    attention_bias = read.flag("attention_bias", default=False)
    return Structure(
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
        sliding_windows=_windows(read, layers),
        activation=GELU_TANH,
        output_norms=True,
        gains_from_one=True,
        embedding_scale=math.sqrt(read.count("hidden_size")),
        query_pre_attn_scalar=read.positive("query_pre_attn_scalar", 256.0),
        local_rope_theta=_local_theta(read),
    )


def _local_theta(read: Fields) -> float:
    """RoPE's base in layers that slide: transformers 5 has a set of parameters for each kind of layer."""
    of_kinds = read.get("rope_parameters")
    sliding = of_kinds.get("sliding_attention") if isinstance(of_kinds, dict) else None
    if isinstance(sliding, dict):
        return positive(sliding.get("rope_theta"), "rope_theta", read.path)
    return read.positive("rope_local_base_freq", 10000.0)


def _windows(read: Fields, layers: int) -> tuple[int | None, ...]:
    """Each layer's window: `layer_types` says which slide, or all but every `sliding_window_pattern`th."""
    window, kinds = read.count("sliding_window"), read.each_layer("layer_types", layers, LAYER_KINDS)
    every = read.count("sliding_window_pattern", 6)
    kinds = kinds or [LAYER_KINDS[(index + 1) % every > 0] for index in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


FAMILY = Family(
    "gemma3_text",
    _structure,
    genai_type="gemma3_text",
    defaults={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": GELU_TANH,
        "sliding_window": 4096,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    default_positions=131072,
    activation_key="hidden_activation",
)
