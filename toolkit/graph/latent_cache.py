"""Attention through a latent with a cache of the latents themselves, one row a token for all heads.

A head's scores are (W_k' q)·c, its values W_v c: what makes keys and values of a latent c is multiplied into queries
and outputs (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). onnxruntime-genai wants keys and values of one shape, so
two layers share those of one: the even one's latents are the key, the odd one's the value.
B batch, S query length, T all tokens so far, H heads, R the latent's width, r its rotated channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx_ir as ir

from toolkit import names
from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.sublayers import LatentAttention
from toolkit.errors import UnsupportedError
from toolkit.graph.attention import Lengths
from toolkit.graph.builder import MS, GraphBuilder
from toolkit.graph.latent import Linears, Norms, flat, heads_of, latents, split
from toolkit.graph.layout import Layout
from toolkit.target import Form

_UNSEEN: Final = -1e30


@dataclass(frozen=True)
class Seen:
    """Which tokens a query sees, for all layers alike: `position_ids` [B, S] of the queries, `bias` [B, 1, S, T],
    which is added to scores, and the shape (0, H, S, T) that these have by heads."""

    position_ids: ir.Value
    bias: ir.Value
    by_head: ir.Value


def cache_row(form: Form, config: ModelConfig) -> tuple[int, int]:
    """Returns the heads of a token's row in the cache, and how wide each is: one of a latent where latents are kept."""
    latent = config.structure.latent
    if not form.latent_cache or latent is None:
        return config.num_key_value_heads, config.head_dim
    return 1, latent.qk_rope_head_dim + latent.kv_lora_rank


def check_latent_cache(form: Form, config: ModelConfig, layout: Layout) -> None:
    """Raises UnsupportedError for a cache of latents where what makes keys and values is in no format that a graph can
    widen."""
    latent = config.structure.latent
    if not form.latent_cache or latent is None:
        return
    for layer in decoder_of(config).layers:
        assert isinstance(layer.attention, LatentAttention)
        module = layer.attention.kv_b_proj
        spec = layout.units[module.weight].spec
        if spec and (spec.bits not in (4, 8) or latent.kv_lora_rank % (spec.block_size * 8 // spec.bits)):
            raise UnsupportedError(
                f"{module.module} in {spec.bits} bits and blocks of {spec.block_size}: a cache of latents wants 8 bits "
                f"in blocks that divide {latent.kv_lora_rank}, or 4 in an even number of blocks"
            )


def cached_numbers(form: Form, config: ModelConfig) -> int:
    """Returns how many numbers the cache has for a token: two rows for a layer, or for two layers of latents, none for
    one of linear attention."""
    delta_net = config.structure.delta_net
    layers = config.num_hidden_layers - (len(delta_net.layers) if delta_net else 0)
    pairs = -(-layers // 2) if form.latent_cache else layers
    return 2 * pairs * math.prod(cache_row(form, config))


def state_numbers(config: ModelConfig) -> int:
    """Returns how many numbers stand for a text of any length, in layers of linear attention."""
    if (shape := config.structure.delta_net) is None:
        return 0
    return len(shape.layers) * (math.prod(shape.conv_state) + math.prod(shape.recurrent_state))


def seen_tokens(build: GraphBuilder, config: ModelConfig, lengths: Lengths) -> Seen:
    """Places and visibility by the attention mask [B, T], whose last S columns are the queries'."""
    path, mask, total, queries = "/model/positions", lengths.mask, lengths.tokens, lengths.queries
    assert mask and total and queries
    one = build.constant(f"{path}/one", np.array([1], np.int64))
    zero = build.constant(f"{path}/zero", np.array([0], np.int64))
    (start,) = build.op(f"{path}/Sub.start", [total, queries])
    (counted,) = build.op(f"{path}/CumSum", [mask, build.constant(f"{path}/axis", np.array(1, np.int64))])
    (before,) = build.op(f"{path}/Sub.before", [counted, one])
    (places,) = build.op(f"{path}/Max", [before, zero])
    (position_ids,) = build.op(f"{path}/Slice.queries", [places, start, total, one])
    end = build.op(f"{path}/Squeeze", [total])[0]
    first, step = (build.constant(f"{path}/{name}", np.array(n, np.int64)) for name, n in (("from", 0), ("by", 1)))
    (columns,) = build.op(f"{path}/Range", [first, end, step])
    (rows,) = build.op(f"{path}/Slice.rows", [columns, start, total, zero])
    (row,) = build.op(f"{path}/Unsqueeze.rows", [rows, one])
    (causal,) = build.op(f"{path}/LessOrEqual", [columns, row])
    both = build.constant(f"{path}/head_and_query", np.array([1, 2], np.int64))
    (kept,) = build.op(f"{path}/Unsqueeze.mask", [build.cast(f"{path}/Cast", mask, ir.DataType.BOOL), both])
    (visible,) = build.op(f"{path}/And", [kept, causal])
    none, low = build.scalar(f"{path}/seen", 0.0), build.scalar(f"{path}/unseen", _UNSEEN)
    (bias,) = build.op(f"{path}/Where", [visible, none, low])
    batch_and_heads = build.constant(f"{path}/batch_and_heads", np.array([0, config.num_attention_heads], np.int64))
    (by_head,) = build.op(f"{path}/Concat", [batch_and_heads, queries, total], {"axis": 0})
    return Seen(position_ids, bias, by_head)


def latent_cache_attention(
    build: GraphBuilder,
    config: ModelConfig,
    path: str,
    attention: LatentAttention,
    x: ir.Value,
    past: ir.Value,
    seen: Seen,
    rotary: list[ir.Value],
    linear: Linears,
    norm: Norms,
) -> tuple[ir.Value, ir.Value]:
    """[B, S, D] to ([B, S, H * v_head_dim], present latents [B, 1, T, r + R])."""
    shape, H = attention.shape, config.num_attention_heads
    nope, rope, rank = shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.kv_lora_rank
    to_keys, to_values = _absorbed(build, path, config, attention)
    latent_q, kv, k_rope = latents(build, path, attention, x, linear, norm)
    q_nope, q_rope = split(
        build, f"{path}/q", heads_of(build, f"{path}/q", linear(latent_q, attention.q_proj), H), nope, rope
    )

    def turned(name: str, value: ir.Value, heads: int) -> ir.Value:
        attributes = {"num_heads": heads, "interleaved": 1}
        return build.op(f"{path}/{name}/RotaryEmbedding", [value, seen.position_ids, *rotary], attributes, MS)[0]

    by_head = heads_of(build, f"{path}/q_rope", turned("q_rope", flat(build, f"{path}/q_rope", q_rope), H), H)
    (q_turned,) = build.op(f"{path}/q_rope/Transpose", [by_head], {"perm": [0, 2, 1, 3]})
    (q_still,) = build.op(f"{path}/q/Transpose", [q_nope], {"perm": [0, 2, 1, 3]})
    (q_latent,) = build.op(f"{path}/q/MatMul", [q_still, to_keys])
    (q,) = build.op(f"{path}/q/Concat", [q_turned, q_latent], {"axis": -1})
    (row,) = build.op(f"{path}/latent/Concat", [turned("k_rope", k_rope, 1), kv], {"axis": -1})
    one = build.constant("/model/constants/one_head", np.array([1], np.int64))
    (new,) = build.op(f"{path}/latent/Unsqueeze", [row, one])
    (present,) = build.op(f"{path}/cache/Concat", [past, new], {"axis": 2})
    # All heads meet one row of the cache in one product: as many rows as queries times heads.
    (scores,) = build.op(
        f"{path}/scores/FusedMatMul",
        [_one_head(build, f"{path}/q", q, rope + rank), present],
        {"transB": 1, "alpha": config.attention_scale},
        MS,
    )
    (apart,) = build.op(f"{path}/scores/Reshape.heads", [scores, seen.by_head])
    (biased,) = build.op(f"{path}/scores/Add", [apart, seen.bias])
    (shares,) = build.op(f"{path}/scores/Softmax", [biased], {"axis": -1})
    (like_scores,) = build.op(f"{path}/scores/Shape.flat", [scores])
    (together,) = build.op(f"{path}/scores/Reshape.flat", [shares, like_scores])
    (mixed,) = build.op(f"{path}/mixed/MatMul", [together, present])
    (like_q,) = build.op(f"{path}/mixed/Shape", [q])
    (by_heads,) = build.op(f"{path}/mixed/Reshape.heads", [mixed, like_q])
    _, latent = split(build, f"{path}/mixed", by_heads, rope, rank)
    (values,) = build.op(f"{path}/values/FusedMatMul", [latent, to_values], {"transB": 1}, MS)
    (in_order,) = build.op(f"{path}/values/Transpose", [values], {"perm": [0, 2, 1, 3]})
    return flat(build, f"{path}/values", in_order), present


def _one_head(build: GraphBuilder, path: str, x: ir.Value, width: int) -> ir.Value:
    """[B, H, S, width] to [B, 1, H * S, width]."""
    shape = build.constant(f"/model/constants/one_head_{width}", np.array([0, 1, -1, width], np.int64))
    return build.op(f"{path}/Reshape.one_head", [x, shape])[0]


def _absorbed(
    build: GraphBuilder, path: str, config: ModelConfig, attention: LatentAttention
) -> tuple[ir.Value, ir.Value]:
    """What makes keys [H, qk_nope_head_dim, R] and values [H, v_head_dim, R] of a latent, in float32.

    The file has kv_b_proj as it is quantized; ONNX Runtime widens it once when it opens the graph, since all of this is
    of initializers.
    """
    shape, unit, of = attention.shape, build.layout.units[attention.kv_b_proj.weight], f"{path}/kv_b"
    by_head = build.constant(
        f"/model/constants/by_head_{shape.kv_lora_rank}",
        np.array([config.num_attention_heads, -1, shape.kv_lora_rank], np.int64),
    )
    if unit.spec is None:
        wide = build.slot(unit.slots[0])
    else:
        bits, block = unit.spec.bits, unit.spec.block_size
        packed, scales, *zero_points = unit.slots
        rows, blocks, _ = packed.shape
        levels = replace(packed, dtype=f"uint{bits}", shape=(rows, blocks, block))
        wide = build.cast(f"{of}/Cast", build.slot(levels), ir.DataType.FLOAT)
        if zero_points:
            points = replace(zero_points[0], dtype=f"uint{bits}", shape=(rows, blocks, 1))
            zero = build.cast(f"{of}/zero_points/Cast", build.slot(points), ir.DataType.FLOAT)
        else:
            zero = build.scalar(f"/model/constants/middle_{bits}", float(1 << bits - 1))
        (centred,) = build.op(f"{of}/Sub", [wide, zero])
        last = build.constant("/model/constants/last_axis", np.array([-1], np.int64))
        (factors,) = build.op(f"{of}/Unsqueeze", [build.scales(of, scales), last])
        (wide,) = build.op(f"{of}/Mul", [centred, factors])
    (heads,) = build.op(f"{of}/Reshape", [wide, by_head])
    sizes = build.constant(
        "/model/constants/key_and_value", np.array([shape.qk_nope_head_dim, shape.v_head_dim], np.int64)
    )
    keys, values = build.op(f"{of}/Split", [heads, sizes], {"axis": 1}, outputs=2)
    return keys, values


def spare_value(build: GraphBuilder, present_key: ir.Value) -> ir.Value:
    """What stands in the last value of an odd number of layers: the key, which nobody reads there."""
    return build.op(f"{names.LENGTHS_PATH}/spare/Identity", [present_key])[0]
