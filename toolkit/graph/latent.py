"""Attention through a latent as GroupQueryAttention computes it: every head with a key and a value of its own.

Heads are put together as [rotated | not rotated], since the operator turns the first channels; values are padded with
zeros to the width of keys, which the cache has them share.
B batch, S query length, H heads, R the latent's width, W a head's width in the cache.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.linears import Linear, Norm
from toolkit.checkpoint.sublayers import LatentAttention
from toolkit.graph.attention import Lengths
from toolkit.graph.builder import MS, GraphBuilder

# Computes a linear, or a norm, of an input.
Linears = Callable[[ir.Value, Linear], ir.Value]
Norms = Callable[[ir.Value, Norm], ir.Value]


def latent_attention(
    build: GraphBuilder,
    config: ModelConfig,
    path: str,
    attention: LatentAttention,
    x: ir.Value,
    past: list[ir.Value],
    lengths: Lengths,
    rotary: list[ir.Value],
    linear: Linears,
    norm: Norms,
) -> tuple[ir.Value, list[ir.Value]]:
    """Turns [B, S, D] into ([B, S, H * v_head_dim], present key and value [B, H, S, W])."""
    shape, H = attention.shape, config.num_attention_heads
    nope, rope, width = shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.qk_head_dim
    latent, kv, k_rope = latents(build, path, attention, x, linear, norm)
    q_nope, q_rope = split(
        build, f"{path}/q", heads_of(build, f"{path}/q", linear(latent, attention.q_proj), H), nope, rope
    )
    made = linear(kv, attention.kv_b_proj)
    k_nope, v = split(build, f"{path}/kv_b", heads_of(build, f"{path}/kv_b", made, H), nope, shape.v_head_dim)
    every = build.constant("/model/constants/every_head", np.array([1, 1, H, 1], np.int64))
    (k_rope,) = build.op(f"{path}/k_rope/Expand", [heads_of(build, f"{path}/k_rope", k_rope, 1), every])
    (q,) = build.op(f"{path}/q/Concat", [q_rope, q_nope], {"axis": -1})
    (k,) = build.op(f"{path}/k/Concat", [k_rope, k_nope], {"axis": -1})
    if width > shape.v_head_dim:
        pads = build.constant("/model/constants/pads", np.array([0] * 7 + [width - shape.v_head_dim], np.int64))
        (v,) = build.op(f"{path}/v/Pad", [v, pads])
    query = [flat(build, f"{path}/{name}", value) for name, value in (("q", q), ("k", k), ("v", v))]
    attributes = {
        "num_heads": H,
        "kv_num_heads": H,
        "scale": config.attention_scale,
        "do_rotary": 1,
        "rotary_interleaved": 1,
    }
    inputs = [*query, *past, lengths.seqlens_k, lengths.total, *rotary]
    y, *present = build.op(f"{path}/GroupQueryAttention", inputs, attributes, MS, outputs=3)
    if width > shape.v_head_dim:
        y, _ = split(
            build, f"{path}/mixed", heads_of(build, f"{path}/mixed", y, H), shape.v_head_dim, width - shape.v_head_dim
        )
        y = flat(build, f"{path}/mixed", y)
    return y, present


def latents(
    build: GraphBuilder, path: str, attention: LatentAttention, x: ir.Value, linear: Linears, norm: Norms
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Returns, of [B, S, D], what queries are made of, the latent [B, S, R] of keys and values, and the keys' channels
    that are rotated."""
    queries = x
    if attention.q_a_proj and attention.q_a_layernorm:
        queries = norm(linear(x, attention.q_a_proj), attention.q_a_layernorm)
    shape = attention.shape
    kv, k_rope = split(
        build, f"{path}/kv_a", linear(x, attention.kv_a_proj), shape.kv_lora_rank, shape.qk_rope_head_dim
    )
    return queries, norm(kv, attention.kv_a_layernorm), k_rope


def heads_of(build: GraphBuilder, path: str, x: ir.Value, heads: int) -> ir.Value:
    """Turns [B, S, heads * width] into [B, S, heads, width]."""
    shape = build.constant(f"/model/constants/heads_{heads}", np.array([0, 0, heads, -1], np.int64))
    return build.op(f"{path}/Reshape.split", [x, shape])[0]


def flat(build: GraphBuilder, path: str, x: ir.Value) -> ir.Value:
    """Turns [B, S, heads, width] into [B, S, heads * width]."""
    shape = build.constant("/model/constants/flat_heads", np.array([0, 0, -1], np.int64))
    return build.op(f"{path}/Reshape.join", [x, shape])[0]


def split(build: GraphBuilder, path: str, x: ir.Value, first: int, second: int) -> tuple[ir.Value, ir.Value]:
    """Cuts the last axis into its first channels and its others."""
    sizes = build.constant(f"/model/constants/split_{first}_{second}", np.array([first, second], np.int64))
    a, b = build.op(f"{path}/Split", [x, sizes], {"axis": -1}, outputs=2)
    return a, b
