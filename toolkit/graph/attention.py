"""Attention over the KV cache: GroupQueryAttention, or the same in plain operators over a cache of fixed length.

B batch, S query length, C cache length, H heads, K kv heads, G = H / K, Dh head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx_ir as ir

from toolkit.checkpoint.anatomy import DecoderLayer, decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.sublayers import Attention
from toolkit.errors import UnsupportedError
from toolkit.graph.builder import MS, GraphBuilder
from toolkit.target import Form

# GroupQueryAttention's rotary kernel refuses other widths.
HEAD_DIM_MULTIPLE: Final = 16
# Which input of GroupQueryAttention has a logit for each head that stands for no token.
_HEAD_SINK: Final = 11


@dataclass(frozen=True)
class Lengths:
    """Where the queries stand: GroupQueryAttention's seqlens_k and total_sequence_length, int32, and position_ids
    int64 [B, S] where RoPE is a node of its own. `tokens` and `queries`, int64 [1], are how many tokens there are so
    far and how many of them are new, and `mask` [B, T] which are text, where a graph is told."""

    seqlens_k: ir.Value
    total: ir.Value
    position_ids: ir.Value | None = None
    tokens: ir.Value | None = None
    queries: ir.Value | None = None
    mask: ir.Value | None = None


@dataclass(frozen=True)
class Geometry:
    """What plain operators need of the positions, for all layers alike.

    `cos` and `sin` [S, Dh/2] of the queries, `is_new` [1, 1, C, 1] marks the cache rows they fill and `source` [C] says
    from which query; `query` [G * S, 1] is each query's position. `at` [S] are the queries' positions too.
    """

    cos: ir.Value
    sin: ir.Value
    is_new: ir.Value
    source: ir.Value
    query: ir.Value
    rows: ir.Value
    at: ir.Value


def check_attention(form: Form, config: ModelConfig, context_length: int) -> None:
    """Raises UnsupportedError for a head_dim that ORT's GroupQueryAttention refuses, and for a sliding window shorter
    than the context where the target's attention knows none."""
    if config.head_dim % HEAD_DIM_MULTIPLE:
        raise UnsupportedError(
            f"head_dim {config.head_dim} is not a multiple of {HEAD_DIM_MULTIPLE}, which GroupQueryAttention needs"
        )
    windows = [layer.attention.window for layer in decoder_of(config).layers if layer.attention.window is not None]
    if windows and not form.local_window and min(windows) < context_length:
        raise UnsupportedError(
            f"{config.model_type} looks back {min(windows)} tokens, and this target's attention knows no sliding "
            f"window: within it both are the same, so lower it with --set context_length={min(windows)}"
        )


def turns(layer: DecoderLayer) -> bool:
    """Whether a layer rotates queries and keys by their position; under latent attention always a part of them."""
    return not isinstance(layer.attention, Attention) or layer.attention.rope


def chosen_rotary(build: GraphBuilder, rotary: list[ir.Value], switch: int, lengths: Lengths) -> list[ir.Value]:
    """Of each table, short texts' rows before long ones', those of as many tokens as there are: a text longer than
    `switch` tokens has the second part's, from its first token on."""
    path = "/model/rotary"
    assert lengths.tokens
    limit = build.constant(f"{path}/switch", np.array([switch], np.int64))
    (is_long,) = build.op(f"{path}/Greater", [lengths.tokens, limit])
    (start,) = build.op(f"{path}/Mul", [build.cast(f"{path}/Cast", is_long, ir.DataType.INT64), limit])
    (end,) = build.op(f"{path}/Add", [start, lengths.tokens])
    return [
        build.op(f"{path}/Slice.{name}", [table, start, end])[0]
        for name, table in zip(("cos", "sin"), rotary, strict=True)
    ]


def group_query_attention(
    build: GraphBuilder,
    config: ModelConfig,
    layer: DecoderLayer,
    query: list[ir.Value | None],
    past: list[ir.Value],
    lengths: Lengths,
    rotary: list[ir.Value],
) -> tuple[ir.Value, list[ir.Value]]:
    """com.microsoft GroupQueryAttention on q, k, v, or on all three packed: ([B, S, H * Dh], present key and value).

    RoPE is its own, or two nodes before it, or neither in a layer without RoPE.
    """
    path = f"/model/layers.{layer.index}/attn"
    rope = turns(layer)
    inside = rope and build.form.rotary_in_attention
    if rope and not inside:
        q, k, v = query
        assert q and k and lengths.position_ids
        at = [lengths.position_ids, *rotary]
        (q,) = build.op(f"{path}/q_rotary/RotaryEmbedding", [q, *at], {"num_heads": config.num_attention_heads}, MS)
        (k,) = build.op(f"{path}/k_rotary/RotaryEmbedding", [k, *at], {"num_heads": config.num_key_value_heads}, MS)
        query = [q, k, v]
    window = layer.attention.window if build.form.local_window else None
    attributes = {
        "num_heads": config.num_attention_heads,
        "kv_num_heads": config.num_key_value_heads,
        "scale": config.attention_scale,
        "do_rotary": int(inside),
        "local_window_size": window or -1,
    }
    inputs = [*query, *past, lengths.seqlens_k, lengths.total, *(rotary if inside else [])]
    if sinks := layer.attention.sinks:
        inputs += [None] * (_HEAD_SINK - len(inputs))
        inputs.append(build.vector(sinks))
    y, *present = build.op(f"{path}/GroupQueryAttention", inputs, attributes, MS, outputs=3)
    return y, present


def geometry(
    build: GraphBuilder, config: ModelConfig, lengths: Lengths, rotary: list[ir.Value], queries: int, cache_length: int
) -> Geometry:
    """Positions as plain operators want them; `queries` is S, `cache_length` C."""
    path, groups = "/model/positions", config.num_attention_heads // config.num_key_value_heads
    flat = build.constant(f"{path}/flat", np.array([-1], np.int64))
    (last,) = build.op(f"{path}/Reshape.last", [build.cast(f"{path}/Cast", lengths.seqlens_k, ir.DataType.INT64), flat])
    (start,) = build.op(f"{path}/Sub.start", [last, build.constant(f"{path}/span", np.array([queries - 1], np.int64))])
    steps = build.constant(f"{path}/steps", np.arange(queries, dtype=np.int64))
    (at,) = build.op(f"{path}/Add.at", [steps, start])
    cos, sin = (
        build.op(f"{path}/Gather.{name}", [table, at])[0] for name, table in zip(("cos", "sin"), rotary, strict=True)
    )
    rows = build.constant(f"{path}/rows", np.arange(cache_length, dtype=np.int64))
    (relative,) = build.op(f"{path}/Sub.relative", [rows, start])
    zero, end = (build.constant(f"{path}/{n}", np.array([v], np.int64)) for n, v in (("first", 0), ("end", queries)))
    (after,) = build.op(f"{path}/GreaterOrEqual", [relative, zero])
    (before,) = build.op(f"{path}/Less", [relative, end])
    (within,) = build.op(f"{path}/And", [after, before])
    shape = build.constant(f"{path}/per_row", np.array([1, 1, cache_length, 1], np.int64))
    (is_new,) = build.op(f"{path}/Reshape.is_new", [within, shape])
    (bounded,) = build.op(f"{path}/Max", [relative, zero])
    (source,) = build.op(f"{path}/Min", [bounded, build.constant(f"{path}/top", np.array([queries - 1], np.int64))])
    grouped = np.tile(np.arange(queries, dtype=np.int64), groups)[:, None]
    (query,) = build.op(f"{path}/Add.query", [build.constant(f"{path}/grouped", grouped), start])
    return Geometry(cos, sin, is_new, source, query, rows, at)


def turned_by(build: GraphBuilder, where: Geometry, rotary: list[ir.Value], path: str) -> Geometry:
    """The same positions with other tables of cos and sin; `path` is of the nodes that look them up."""
    cos, sin = (
        build.op(f"{path}/Gather.{name}", [table, where.at])[0]
        for name, table in zip(("cos", "sin"), rotary, strict=True)
    )
    return replace(where, cos=cos, sin=sin)


def plain_attention(
    build: GraphBuilder,
    config: ModelConfig,
    layer: DecoderLayer,
    query: list[ir.Value | None],
    past: list[ir.Value],
    where: Geometry,
) -> tuple[ir.Value, list[ir.Value]]:
    """Builds what GroupQueryAttention computes in plain operators, for B = 1 and a cache of fixed length. Returns the
    attention's output [1, S, H * Dh] and the present keys and values."""
    path = f"/model/layers.{layer.index}/attn"
    H, K, Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = (
        _heads(build, f"{path}/{name}", x, count, Dh)
        for name, x, count in zip(("q", "k", "v"), query, (H, K, K), strict=True)
    )
    present = []
    if turns(layer):
        k = _rotated(build, f"{path}/k", k, where)
    for name, x, old in (("k", k, past[0]), ("v", v, past[1])):
        (spread,) = build.op(f"{path}/{name}/Gather", [x, where.source], {"axis": 2})
        present.append(build.op(f"{path}/{name}/Where", [where.is_new, spread, old])[0])
    if turns(layer):
        q = _rotated(build, f"{path}/q", q, where)
    scale = build.scalar("/model/constants/scale", config.attention_scale)
    (scaled,) = build.op(f"{path}/q/Mul.scale", [q, scale])
    grouped = build.constant("/model/constants/grouped", np.array([1, K, -1, Dh], np.int64))
    (q,) = build.op(f"{path}/q/Reshape.grouped", [scaled, grouped])
    (turned,) = build.op(f"{path}/k/Transpose.present", [present[0]], {"perm": [0, 1, 3, 2]})
    (scores,) = build.op(f"{path}/MatMul.scores", [q, turned])
    lowest = build.scalar("/model/constants/lowest", float(np.finfo(np.float16).min))
    (masked,) = build.op(f"{path}/Where.scores", [_visible(build, layer.attention.window, where), scores, lowest])
    (weights,) = build.op(f"{path}/Softmax", [masked], {"axis": -1})
    (mixed,) = build.op(f"{path}/MatMul.values", [weights, present[1]])
    split = build.constant("/model/constants/heads", np.array([1, H, -1, Dh], np.int64))
    (apart,) = build.op(f"{path}/Reshape.heads", [mixed, split])
    (back,) = build.op(f"{path}/Transpose.heads", [apart], {"perm": [0, 2, 1, 3]})
    joined = build.constant("/model/constants/joined", np.array([1, -1, H * Dh], np.int64))
    return build.op(f"{path}/Reshape.joined", [back, joined])[0], present


def _heads(build: GraphBuilder, path: str, x: ir.Value | None, heads: int, head_dim: int) -> ir.Value:
    """[1, S, H * Dh] to [1, H, S, Dh]."""
    shape = build.constant(f"/model/constants/split_{heads}", np.array([1, -1, heads, head_dim], np.int64))
    (split,) = build.op(f"{path}/Reshape.split", [x, shape])
    return build.op(f"{path}/Transpose.split", [split], {"perm": [0, 2, 1, 3]})[0]


def _rotated(build: GraphBuilder, path: str, x: ir.Value, where: Geometry) -> ir.Value:
    """RoPE on [1, H, S, Dh], whose halves turn against each other."""
    first, second = build.op(f"{path}/Split", [x], {"axis": -1, "num_outputs": 2}, outputs=2)
    parts = []
    for k, (kept, turned, op) in enumerate(((first, second, "Sub"), (second, first, "Add"))):
        (a,) = build.op(f"{path}/Mul.cos{k}", [kept, where.cos])
        (b,) = build.op(f"{path}/Mul.sin{k}", [turned, where.sin])
        parts.append(build.op(f"{path}/{op}", [a, b])[0])
    return build.op(f"{path}/Concat", parts, {"axis": -1})[0]


def _visible(build: GraphBuilder, window: int | None, where: Geometry) -> ir.Value:
    """[G * S, C]: the cache rows each query may look at. One mask serves all layers of a window."""
    path = "/model/positions"
    causal = build.once(f"{path}/LessOrEqual", [where.rows, where.query])
    if window is None:
        return causal
    span = build.constant(f"{path}/window_{window}", np.array([window], np.int64))
    first = build.once(f"{path}/Sub.window_{window}", [where.query, span])
    near = build.once(f"{path}/Greater.window_{window}", [where.rows, first])
    return build.once(f"{path}/And.window_{window}", [causal, near])
