"""What every stage is built from: embedding, transformer layers, LM head.

B batch, S query length, D hidden, H heads, K kv heads, Dh head_dim, V vocab.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx_ir as ir

from toolkit import names
from toolkit.checkpoint.anatomy import DecoderLayer, decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.family import GELU_TANH, SILU
from toolkit.checkpoint.linears import Linear, Norm
from toolkit.checkpoint.rope_config import RopeConfig
from toolkit.checkpoint.sublayers import Attention, LatentAttention, LinearAttention, Mlp, Moe, Sublayer
from toolkit.errors import UnsupportedError
from toolkit.graph.attention import (
    Geometry,
    Lengths,
    check_attention,
    chosen_rotary,
    geometry,
    group_query_attention,
    plain_attention,
    turned_by,
)
from toolkit.graph.builder import MS, GraphBuilder
from toolkit.graph.cached import CacheShape, given_back, latent_taken, taken_by
from toolkit.graph.latent import latent_attention
from toolkit.graph.latent_cache import Seen, latent_cache_attention, seen_tokens, spare_value
from toolkit.graph.layout import Unit
from toolkit.graph.linear_attention import linear_attention
from toolkit.graph.rope import rotary_caches
from toolkit.quant.ranges import HEADROOM, ActivationRange
from toolkit.target import CPU_FORM, Form

_SIGMOID: Final = ActivationRange(0.0, 1.0 / HEADROOM)
# Beyond any position, as Slice wants it.
_END: Final = (1 << 63) - 1


@dataclass(frozen=True)
class Rotation:
    """Tables of cos and sin; the positions as plain operators want them, where attention is written in these, and what
    is seen where a cache of latents has no operator of its own."""

    tables: list[ir.Value]
    where: Geometry | None
    seen: Seen | None = None


def embedding(build: GraphBuilder, ids: ir.Value) -> ir.Value:
    """[B, S] ids to [B, S, D]. The CPU looks float32 rows up; another dtype is a cast of them."""
    rows = looked_up(build, "/model/embed_tokens", build.layout.units[names.weight(names.EMBED_TOKENS)], ids)
    return rows if build.dtype == ir.DataType.FLOAT else build.cast("/model/embed_tokens/Cast", rows, build.dtype)


def looked_up(build: GraphBuilder, path: str, unit: Unit, ids: ir.Value) -> ir.Value:
    """The rows of a table that ids [B, S] name, [B, S, D] in float32."""
    if unit.spec is None:
        (rows,) = build.op(f"{path}/Gather", [build.slot(unit.slots[0]), ids])
    else:
        packed = unit.slots[0]
        count, blocks, block_bytes = packed.shape
        # A tied head reads the same bytes as [V, J, block]; the embedding wants them flat.
        flat = build.slot(replace(packed, name=f"{packed.name}.flat", shape=(count, blocks * block_bytes)))
        scales, zero_points = build.scales(path, unit.slots[1]), map(build.slot, unit.slots[2:])
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": unit.spec.block_size, "bits": unit.spec.bits}
        (rows,) = build.op(f"{path}/GatherBlockQuantized", [flat, ids, scales, *zero_points], attributes, MS)
    return rows


def check_layers(form: Form, config: ModelConfig, context_length: int) -> None:
    """Raises UnsupportedError for a head_dim that ORT's GroupQueryAttention refuses, for a sliding window shorter than
    the context where the target's attention knows none, and for biases or GELU in an MLP of uint16."""
    check_attention(form, config, context_length)
    if form.latent_cache and config.structure.latent is None:
        raise UnsupportedError(
            f"{config.model_type} makes no latents that a cache could keep: leave out profile=latent-cache"
        )
    if form.qdq and (config.structure.mlp_bias or config.structure.activation != SILU):
        what = "mlp_bias" if config.structure.mlp_bias else config.structure.activation
        raise UnsupportedError(f"{config.model_type} with {what} has no form in uint16: set profile=float16")


def layers(
    build: GraphBuilder,
    config: ModelConfig,
    context_length: int,
    embedded: ir.Value,
    lengths: Lengths,
    cache: CacheShape,
) -> tuple[ir.Value, list[ir.Value], list[ir.Value]]:
    """The cache's layers, and the final norm after the model's last: ([B, S, D] hidden states, cache inputs, cache
    outputs). Layers that are not the first take, and those that are not the last give, the residual sum.

    Raises as `check_layers`.
    """
    check_layers(build.form, config, context_length)
    decoder = decoder_of(config)
    stack = decoder.layers if cache.layers is None else decoder.layers[cache.layers.start : cache.layers.stop]
    turned = _rotations(build, config, context_length, embedded, lengths, cache)
    past: list[ir.Value] = []
    present: list[ir.Value] = []
    residual, first = embedded, stack[0]
    hidden = rms_norm(build, _path(first.attention.norm.module), residual, first.attention.norm, config.stream_eps)
    for layer in stack:
        i, attention = layer.index, layer.attention
        hidden = build.rounded(f"/model/layers.{i}/attn/input", hidden, names.input_of(attention.first[0].module))
        given = taken_by(build, config, cache, layer)
        mixed, made = _attend(build, config, layer, hidden, given, turned[config.rope_of(attention.window)], lengths)
        present += [given_back(build, config, cache, output, taken) for output, taken in zip(made, given, strict=True)]
        past += given
        mixed = build.rounded(f"/model/layers.{i}/attn/mixed", mixed, names.input_of(attention.last.module))
        attended = _output_norm(build, config, attention, _linear(build, mixed, attention.last))
        hidden, residual = _skip_norm(build, attended, residual, layer.mlp.norm, config)
        product = _output_norm(build, config, layer.mlp, _mlp_of(build, layer, hidden))
        if layer is stack[-1] and layer is not decoder.layers[-1]:
            (hidden,) = build.op(f"/model/layers.{i}/Add", [product, residual])
            break
        after = decoder.norm if layer is decoder.layers[-1] else decoder.layers[i + 1].attention.norm
        hidden, residual = _skip_norm(build, product, residual, after, config)
    if build.form.latent_cache and len(stack) % 2:
        spare = latent_taken(build, config, cache, len(stack))
        present.append(given_back(build, config, cache, spare_value(build, present[-1]), spare))
        past.append(spare)
    return hidden, past, present


def _rotations(
    build: GraphBuilder,
    config: ModelConfig,
    context_length: int,
    embedded: ir.Value,
    lengths: Lengths,
    cache: CacheShape,
) -> dict[RopeConfig, Rotation]:
    """How the cache's layers are turned, by their RoPE."""
    layers = decoder_of(config).layers
    stack = layers if cache.layers is None else layers[cache.layers.start : cache.layers.stop]
    dtype = np.float16 if build.dtype == ir.DataType.FLOAT16 else np.float32
    found: dict[RopeConfig, Rotation] = {}
    where, seen = None, seen_tokens(build, config, lengths) if build.form.latent_cache else None
    for rope in dict.fromkeys(config.rope_of(layer.attention.window) for layer in stack):
        path = "/model/rotary" if rope == config.rope else "/model/local_rotary"
        tables = [
            build.constant(f"{path}/{name}_cache", table.astype(dtype))
            for name, table in zip(("cos", "sin"), rotary_caches(config, rope, context_length), strict=True)
        ]
        if (switch := rope.switch(context_length)) is not None:
            tables = chosen_rotary(build, tables, switch, lengths)
        if where:
            where = turned_by(build, where, tables, path)
        elif build.form.plain_attention:
            shape = embedded.shape
            assert shape is not None and isinstance(shape[1], int) and isinstance(cache.past, int)
            where = geometry(build, config, lengths, tables, shape[1], cache.past)
        found[rope] = Rotation(tables, where, seen)
    return found


def _output_norm(build: GraphBuilder, config: ModelConfig, half: Sublayer, x: ir.Value) -> ir.Value:
    """[B, S, D] to [B, S, D]: what a sublayer gives, through the norm behind it where there is one."""
    norm = None if isinstance(half, Moe) else half.output_norm
    return rms_norm(build, _path(norm.module), x, norm, config.rms_norm_eps) if norm else x


def lm_head(build: GraphBuilder, config: ModelConfig, hidden: ir.Value, index: ir.Value) -> ir.Value:
    """[B, S, D] to logits [B, 1, V] at each row's position `index` int64 [B, 1]."""
    return _logits(build, config, last_position(build, hidden, index))


def last_position(build: GraphBuilder, hidden: ir.Value, index: ir.Value) -> ir.Value:
    """[B, S, D] to [B, 1, D], each row's position `index` int64 [B, 1]."""
    (row,) = build.op(names.LAST_POSITION_GATHER, [hidden, index], {"batch_dims": 1})
    axis = build.constant(f"{names.LAST_POSITION_PATH}/axis", np.array([1], np.int64))
    return build.op(names.LAST_POSITION_UNSQUEEZE, [row, axis])[0]


def last_rows(build: GraphBuilder, config: ModelConfig, hidden: ir.Value, index: ir.Value, rows: int) -> ir.Value:
    """[B, S, D] to logits [B, S, V] as float32, which are zeros but for the last `rows` positions up to `index`.

    onnxruntime-genai checks guesses in a buffer of every position's logits; of a batch of unequal lengths there are as
    many more rows as reach every row's last position.
    """
    zero, one, end = (build.constant(f"{names.LAST_ROWS_PATH}/{k}", np.array([k], np.int64)) for k in (0, 1, _END))
    (first,) = build.op(f"{names.LAST_ROWS_PATH}/ReduceMin", [index, zero], {"keepdims": 0})
    before = build.constant(names.LAST_ROWS_BEFORE, np.array([rows - 1], np.int64))
    (begin,) = build.op(f"{names.LAST_ROWS_PATH}/Sub", [first, before])
    (start,) = build.op(f"{names.LAST_ROWS_PATH}/Max", [begin, zero])
    others = build.constant(f"{names.LAST_ROWS_PATH}/others", np.zeros(4, np.int64))
    (pads,) = build.op(f"{names.LAST_ROWS_PATH}/Concat", [zero, start, others], {"axis": 0})
    (kept,) = build.op("/model/last_rows/Slice", [hidden, start, end, one])
    return build.op("/lm_head/Pad", [_logits(build, config, kept), pads])[0]


def _logits(build: GraphBuilder, config: ModelConfig, hidden: ir.Value) -> ir.Value:
    """The LM head over hidden states; float32, as the CPU is fastest."""
    if build.dtype != ir.DataType.FLOAT:
        hidden = build.cast("/lm_head/Cast", hidden, ir.DataType.FLOAT)
    return build.linear("/lm_head", hidden, decoder_of(config).head.module, form=CPU_FORM)


def _path(module: str) -> str:
    """The path of a layer's module in the graph: `/model/layers.3/attn/q_proj` of `model.layers.3.self_attn.q_proj`."""
    model, layers, index, inner = module.split(".", 3)
    return f"/{model}/{layers}.{index}/{inner.replace('self_attn', 'attn').replace('.', '/')}"


def _linear(build: GraphBuilder, x: ir.Value, linear: Linear) -> ir.Value:
    """The product of a layer's linear, under its path."""
    return build.linear(_path(linear.module), x, linear.module)


def rms_norm(build: GraphBuilder, path: str, x: ir.Value, norm: Norm, epsilon: float) -> ir.Value:
    """`x` through a norm over its last axis; `epsilon` where the norm has none of its own."""
    attributes = {"axis": -1, "epsilon": norm.eps or epsilon}
    op_type = "RMSNormalization" if build.form.opset >= 23 else "SimplifiedLayerNormalization"
    return build.op(f"{path}/{op_type}", [x, build.vector(norm.weight)], attributes)[0]


def _skip_norm(
    build: GraphBuilder, x: ir.Value, skip: ir.Value, norm: Norm, config: ModelConfig
) -> tuple[ir.Value, ir.Value]:
    """(normalized, residual sum)."""
    path = f"/{norm.module.replace('.', '/', 1)}"
    if not build.form.fused:
        (total,) = build.op(f"{path}/Add", [x, skip])
        return rms_norm(build, path, total, norm, config.stream_eps), total
    y = build.op(
        f"{path}/SkipSimplifiedLayerNormalization",
        [x, skip, build.vector(norm.weight)],
        {"epsilon": config.stream_eps},
        MS,
        outputs=4,
    )
    y[1].name = y[2].name = ""
    return y[0], y[3]


def _attend(
    build: GraphBuilder,
    config: ModelConfig,
    layer: DecoderLayer,
    x: ir.Value,
    pair: list[ir.Value],
    turned: Rotation,
    lengths: Lengths,
) -> tuple[ir.Value, list[ir.Value]]:
    """[B, S, D] to (what o_proj reads, present key and value)."""
    path = f"/model/layers.{layer.index}/attn"

    def linear(x: ir.Value, of: Linear) -> ir.Value:
        return _linear(build, x, of)

    if isinstance(layer.attention, LinearAttention):
        return linear_attention(build, config, path, layer.attention, x, pair, linear)
    if isinstance(layer.attention, LatentAttention):

        def norm(x: ir.Value, of: Norm) -> ir.Value:
            return rms_norm(build, _path(of.module), x, of, config.rms_norm_eps)

        rotary = turned.tables
        if turned.seen:
            (latents,), seen = pair, turned.seen
            mixed, made = latent_cache_attention(
                build, config, path, layer.attention, x, latents, seen, rotary, linear, norm
            )
            return mixed, [made]
        return latent_attention(build, config, path, layer.attention, x, pair, lengths, rotary, linear, norm)
    query = _query_key_value(build, config, layer.attention, x)
    if turned.where:
        return plain_attention(build, config, layer, query, pair, turned.where)
    attended, present = group_query_attention(build, config, layer, query, pair, lengths, turned.tables)
    if gate := layer.attention.gate_proj:
        (open_part,) = build.op(f"{path}/gate/Sigmoid", [linear(x, gate)])
        (attended,) = build.op(f"{path}/gate/Mul", [attended, open_part])
    return attended, present


def _query_key_value(
    build: GraphBuilder, config: ModelConfig, attention: Attention, x: ir.Value
) -> list[ir.Value | None]:
    """[q, k, v], each [B, S, heads * Dh], or [all packed, None, None]."""
    if names.weight(attention.qkv_proj) in build.layout.units:
        return [build.linear(_path(attention.qkv_proj), x, attention.qkv_proj), None, None]
    if names.weight(attention.kv_proj) in build.layout.units:
        q, path = _linear(build, x, attention.q_proj), _path(attention.kv_proj)
        both = build.linear(path, x, attention.kv_proj)
        k, v = build.op(f"{path}/Split", [both], {"axis": -1, "num_outputs": 2}, outputs=2)
    else:
        q, k, v = (_linear(build, x, linear) for linear in attention.qkv)
    if attention.q_norm:
        q = _head_norm(build, q, attention.q_norm, attention.q_proj, config)
    if attention.k_norm:
        k = _head_norm(build, k, attention.k_norm, attention.k_proj, config)
    return [q, k, v]


def _head_norm(build: GraphBuilder, x: ir.Value, norm: Norm, linear: Linear, config: ModelConfig) -> ir.Value:
    """RMSNorm over each head's Dh channels of a linear's output (qwen3), before RoPE.

    As [B, S * H, Dh]: QNN computes norms of rank 4 wrongly and in silence.
    """
    path, width = _path(norm.module), linear.out_features
    heads = build.constant("/model/constants/per_head", np.array([0, -1, norm.width], np.int64))
    flat = build.constant(f"/model/constants/flat_{width}", np.array([0, -1, width], np.int64))
    (split,) = build.op(f"{path}/Reshape.split", [x, heads])
    return build.op(f"{path}/Reshape.join", [rms_norm(build, path, split, norm, config.rms_norm_eps), flat])[0]


def _mlp_of(build: GraphBuilder, layer: DecoderLayer, x: ir.Value) -> ir.Value:
    """[B, S, D] to [B, S, D] through a layer's second sublayer."""
    path = f"/model/layers.{layer.index}/mlp"
    if isinstance(layer.mlp, Moe):
        return _moe(build, path, layer.mlp, x)
    return _mlp(build, path, layer.mlp, x)


def _mlp(build: GraphBuilder, path: str, mlp: Mlp, x: ir.Value) -> ir.Value:
    """[B, S, D] to [B, S, D]. In a form of uint16 every value on the way is: HTP's Swish of it is wrong in silence."""
    x = build.rounded(f"{path}/input", x, names.input_of(mlp.normed_input.name))
    gate = _linear(build, x, mlp.gate_proj)
    up = _linear(build, x, mlp.up_proj)
    (sigmoid,) = build.op(f"{path}/Sigmoid", [_gelu_inside(build, path, gate) if mlp.activation == GELU_TANH else gate])
    if build.form.qdq:
        sigmoid = build.between(f"{path}/sigmoid", sigmoid, _SIGMOID)
    (silu,) = build.op(f"{path}/Mul.silu", [gate, sigmoid])
    silu = build.rounded(f"{path}/silu", silu, names.output_of(mlp.act_fn))
    (product,) = build.op(f"{path}/Mul", [silu, up])
    product = build.rounded(f"{path}/product", product, names.input_of(mlp.inner_input.name))
    return _linear(build, product, mlp.down_proj)


def _gelu_inside(build: GraphBuilder, path: str, gate: ir.Value) -> ir.Value:
    """What GELU's tanh form takes the sigmoid of: sqrt(8 / pi) (x + 0.044715 x^3)."""
    a = build.scalar("/model/constants/gelu_linear", math.sqrt(8 / math.pi))
    b = build.scalar("/model/constants/gelu_cubic", math.sqrt(8 / math.pi) * 0.044715)
    (square,) = build.op(f"{path}/Mul.square", [gate, gate])
    (scaled,) = build.op(f"{path}/Mul.scaled", [square, b])
    (factor,) = build.op(f"{path}/Add.factor", [scaled, a])
    return build.op(f"{path}/Mul.inside", [gate, factor])[0]


def _moe(build: GraphBuilder, path: str, moe: Moe, x: ir.Value) -> ir.Value:
    """[B, S, D] to [B, S, D]: each token through the experts that the router's logits [B, S, E] put first.

    The operator weighs the chosen by the softmax over them. Where a family takes the softmax over all experts, the two
    differ by one factor for each token, the sum of the chosen ones' shares.
    """
    logits = _linear(build, x, moe.router)
    flat = build.constant(f"/model/constants/flat_{moe.routing.count}", np.array([-1, moe.routing.count], np.int64))
    (by_token,) = build.op(f"{path}/Reshape", [logits, flat])
    if moe.routing.groups:
        n_group, topk_group = moe.routing.groups
        by_groups = {"n_group": n_group, "topk_group": topk_group, "group_topk": 2, "top_k": moe.routing.per_token}
        given = [by_token, build.vector(moe.choice_bias)]
        (by_token,) = build.op(f"{path}/MoEGroupRouter", given, by_groups, MS)
    y = build.experts(path, x, by_token, moe)
    y = y if moe.routing.normalized else _of_all(build, path, moe, logits, y)
    if moe.routing.scaling != 1:
        (y,) = build.op(f"{path}/Mul.scaling", [y, build.scalar("/model/constants/scaling", moe.routing.scaling)])
    if moe.shared:
        (y,) = build.op(f"{path}/Add", [y, _mlp(build, f"{path}/shared_experts", moe.shared, x)])
    return y


def _of_all(build: GraphBuilder, path: str, moe: Moe, logits: ir.Value, y: ir.Value) -> ir.Value:
    """The experts' output times the chosen ones' part of the softmax over all."""
    (shares,) = build.op(f"{path}/Softmax", [logits], {"axis": -1})
    k = build.constant(f"/model/constants/top_{moe.routing.per_token}", np.array([moe.routing.per_token], np.int64))
    chosen, _ = build.op(f"{path}/TopK", [shares, k], {"axis": -1}, outputs=2)
    last = build.constant("/model/constants/last_axis", np.array([-1], np.int64))
    (share,) = build.op(f"{path}/ReduceSum", [chosen, last], {"keepdims": 1})
    return build.op(f"{path}/Mul", [y, share])[0]
