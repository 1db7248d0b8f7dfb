"""gpt-oss: experts with biases and a bounded SwiGLU, attention sinks, every second layer over a window of the text.
modeling_gpt_oss.py of transformers, which has alpha and the limit as constants."""

from __future__ import annotations

from toolkit.checkpoint.family import LAYER_KINDS, Experts, Family, Structure
from toolkit.checkpoint.fields import Fields
from toolkit.errors import CheckpointError


def _structure(read: Fields, layers: int) -> Structure:
    count, per_token = read.count("num_local_experts"), read.count("num_experts_per_tok")
    if per_token > count:
        raise CheckpointError(
            f"{read.path}: num_experts_per_tok is {per_token}, expected at most the {count} of num_local_experts"
        )
    experts = Experts(
        count,
        per_token,
        read.count("intermediate_size"),
        normalized=True,
        alpha=1.702,
        offset=1.0,
        limit=7.0,
        biased=True,
        router="router",
        stacked=True,
    )
    return Structure(qkv_bias=True, o_bias=True, sliding_windows=_windows(read, layers), experts=experts, sinks=True)


def _windows(read: Fields, layers: int) -> tuple[int | None, ...]:
    """Each layer's window: those that `layer_types` says, or every second from the first on."""
    if read.get("sliding_window") is None:
        return ()
    window, kinds = read.count("sliding_window"), read.each_layer("layer_types", layers, LAYER_KINDS)
    kinds = kinds or [LAYER_KINDS[(index + 1) % 2] for index in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


FAMILY = Family(
    "gpt_oss",
    _structure,
    defaults={
        "head_dim": 64,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    default_positions=131072,
)
