"""Qwen3.5's dense decoder: three layers of four with linear attention by the gated delta rule, the fourth with a gate
on attention's output and RoPE on a quarter of each head; gains that count from 1. modeling_qwen3_5.py of transformers.

Of a text without pictures the three positions of its RoPE are one (mrope_section), so that it is the ordinary one."""

from __future__ import annotations

from toolkit.checkpoint.family import DeltaNet, Family, Structure
from toolkit.checkpoint.fields import Fields
from toolkit.errors import CheckpointError, UnsupportedError

_KINDS = ("full_attention", "linear_attention")


def _structure(read: Fields, layers: int) -> Structure:
    for key, expected in (("attention_bias", False), ("attn_output_gate", True)):
        if read.flag(key, default=expected) != expected:
            raise UnsupportedError(f"{read.path}: {key} is {not expected}, which is not supported: expected {expected}")
    return Structure(qk_norm=True, gains_from_one=True, output_gate=True, delta_net=_delta_net(read, layers))


def _delta_net(read: Fields, layers: int) -> DeltaNet | None:
    """What layers of linear attention have, all but every `full_attention_interval`th unless `layer_types` says."""
    every, kinds = read.count("full_attention_interval"), read.each_layer("layer_types", layers, _KINDS)
    kinds = kinds or [_KINDS[(index + 1) % every > 0] for index in range(layers)]
    found = DeltaNet(
        tuple(index for index, kind in enumerate(kinds) if kind == "linear_attention"),
        read.count("linear_num_key_heads"),
        read.count("linear_num_value_heads"),
        read.count("linear_key_head_dim"),
        read.count("linear_value_head_dim"),
        read.count("linear_conv_kernel_dim", least=2),
    )
    if found.linear_num_value_heads % found.linear_num_key_heads:
        raise CheckpointError(
            f"{read.path}: linear_num_key_heads {found.linear_num_key_heads} cannot serve linear_num_value_heads "
            f"{found.linear_num_value_heads} evenly"
        )
    if len(found.layers) == layers:
        raise UnsupportedError(f"{read.path}: layer_types has no full_attention, which onnxruntime-genai counts by")
    return found if found.layers else None


FAMILY = Family(
    "qwen3_5_text",
    _structure,
    genai_type="qwen3_5_text",
    defaults={
        "head_dim": 256,
        "num_key_value_heads": 4,
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    },
    partial_rotary=True,
)
