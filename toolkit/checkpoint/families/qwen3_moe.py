"""Qwen3 with experts (30B-A3B, 235B-A22B): modeling_qwen3_moe.py of transformers, whose layers all slide or none."""

from __future__ import annotations

from dataclasses import replace

from toolkit.checkpoint.family import Experts, Family, Structure, sliding_windows
from toolkit.checkpoint.fields import Fields
from toolkit.errors import CheckpointError


def _structure(read: Fields, layers: int) -> Structure:
    attention_bias = read.flag("attention_bias", default=False)
    dense = Structure(
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
        sliding_windows=sliding_windows(read, layers, [True] * layers, listed=False),
    )
    return replace(dense, experts=_experts(read, layers)) if read.count("num_experts", least=0) else dense


def _experts(read: Fields, layers: int) -> Experts:
    count, per_token = read.count("num_experts"), read.count("num_experts_per_tok")
    if per_token > count:
        raise CheckpointError(
            f"{read.path}: num_experts_per_tok is {per_token}, expected at most the {count} of num_experts"
        )
    step, listed = read.count("decoder_sparse_step"), read.indices("mlp_only_layers", layers)
    return Experts(
        count,
        per_token,
        read.count("moe_intermediate_size"),
        normalized=read.flag("norm_topk_prob", default=False),
        dense_layers=tuple(index for index in range(layers) if index in listed or (index + 1) % step),
    )


FAMILY = Family(
    "qwen3_moe",
    _structure,
    defaults={
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
    },
)
