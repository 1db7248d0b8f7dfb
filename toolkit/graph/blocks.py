"""What every stage is built from: embedding, transformer layers, LM head.

B batch, S query length, D hidden, H heads, K kv heads, Dh head_dim, V vocab.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx_ir as ir

from toolkit import names
from toolkit.checkpoint.config import ModelConfig
from toolkit.errors import UnsupportedError
from toolkit.graph.attention import Lengths, check_attention, geometry, group_query_attention, plain_attention
from toolkit.graph.builder import MS, GraphBuilder, declare, value
from toolkit.graph.rope import rotary_caches
from toolkit.quant.ranges import HEADROOM, ActivationRange
from toolkit.target import CPU_FORM

_SIGMOID: Final = ActivationRange(0.0, 1.0 / HEADROOM)


@dataclass(frozen=True)
class CacheShape:
    """The KV cache as graph inputs and outputs: batch, past and total length, each a number or a name, for these
    layers, all if None."""

    batch: int | str
    past: int | str
    total: int | str
    layers: range | None = None


def embedding(build: GraphBuilder, ids: ir.Value) -> ir.Value:
    """[B, S] ids to [B, S, D]. The CPU looks float32 rows up; another dtype is a cast of them."""
    unit = build.layout.units[names.weight(names.EMBED_TOKENS)]
    path = "/model/embed_tokens"
    if unit.spec is None:
        (rows,) = build.op(f"{path}/Gather", [build.slot(unit.slots[0]), ids])
    else:
        packed = unit.slots[0]
        count, blocks, block_bytes = packed.shape
        # A tied head reads the same bytes as [V, J, block]; the embedding wants them flat.
        flat = build.slot(replace(packed, name=f"{packed.name}.flat", shape=(count, blocks * block_bytes)))
        scales, *zero_points = [build.slot(slot) for slot in unit.slots[1:]]
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": unit.spec.block_size, "bits": unit.spec.bits}
        (rows,) = build.op(f"{path}/GatherBlockQuantized", [flat, ids, scales, *zero_points], attributes, MS)
    return rows if build.dtype == ir.DataType.FLOAT else build.cast(f"{path}/Cast", rows, build.dtype)


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

    Raises UnsupportedError for a head_dim that ORT's GroupQueryAttention refuses, for a sliding window shorter than
    the context where the target's attention knows none, and for biases in an MLP of uint16.
    """
    check_attention(build, config, context_length)
    if build.form.qdq and config.mlp_bias:
        raise UnsupportedError(f"{config.model_type} with mlp_bias has no form in uint16: set profile=float16")
    dtype = np.float16 if build.dtype == ir.DataType.FLOAT16 else np.float32
    rotary = [
        build.constant(f"/model/rotary/{name}_cache", table.astype(dtype))
        for name, table in zip(("cos", "sin"), rotary_caches(config, context_length), strict=True)
    ]
    where = None
    if build.form.plain_attention:
        shape = embedded.shape
        assert shape is not None and isinstance(shape[1], int) and isinstance(cache.past, int)
        where = geometry(build, config, lengths, rotary, shape[1], cache.past)
    past: list[ir.Value] = []
    present: list[ir.Value] = []
    residual, span = embedded, cache.layers or range(config.num_hidden_layers)
    first = names.layer_module(span.start, "input_layernorm")
    hidden = _rms_norm(build, f"/model/layers.{span.start}/input_layernorm", residual, first, config)
    for i in span:
        attn = names.layer_module(i, "self_attn")
        hidden = build.rounded(f"/model/layers.{i}/attn/input", hidden, names.input_of(f"{attn}.q_proj"))
        kept = (cache.batch, config.num_key_value_heads, cache.past, config.head_dim)
        grown = (cache.batch, config.num_key_value_heads, cache.total, config.head_dim)
        pair = [value(name(i), build.dtype, kept) for name in (names.past_key, names.past_value)]
        query = _query_key_value(build, config, i, hidden)
        if where:
            mixed, made = plain_attention(build, config, i, query, pair, where)
        else:
            mixed, made = group_query_attention(build, config, i, query, pair, lengths, rotary)
        for output, name in zip(made, (names.present_key(i), names.present_value(i)), strict=True):
            present.append(declare(output, name, build.dtype, grown))
        past += pair
        mixed = build.rounded(f"/model/layers.{i}/attn/mixed", mixed, names.input_of(f"{attn}.o_proj"))
        attended = build.linear(f"/model/layers.{i}/attn/o_proj", mixed, f"{attn}.o_proj")
        module = names.layer_module(i, "post_attention_layernorm")
        hidden, residual = _skip_norm(build, attended, residual, module, config)
        product = _mlp(build, i, hidden)
        if i + 1 == span.stop < config.num_hidden_layers:
            (hidden,) = build.op(f"/model/layers.{i}/Add", [product, residual])
            break
        after = names.layer_module(i + 1, "input_layernorm") if i + 1 < config.num_hidden_layers else names.FINAL_NORM
        hidden, residual = _skip_norm(build, product, residual, after, config)
    return hidden, past, present


def lm_head(build: GraphBuilder, config: ModelConfig, hidden: ir.Value, index: ir.Value) -> ir.Value:
    """[B, S, D] to logits [B, 1, V] at each row's position `index` int64 [B, 1]; float32, as the CPU is fastest."""
    (row,) = build.op("/model/last_position/GatherND", [hidden, index], {"batch_dims": 1})
    axis = build.constant("/model/last_position/axis", np.array([1], np.int64))
    (last,) = build.op("/model/last_position/Unsqueeze", [row, axis])
    if build.dtype != ir.DataType.FLOAT:
        last = build.cast("/lm_head/Cast", last, ir.DataType.FLOAT)
    weight_of = names.EMBED_TOKENS if config.tie_word_embeddings else names.LM_HEAD
    return build.linear("/lm_head", last, names.LM_HEAD, weight_of=weight_of, form=CPU_FORM)


def _rms_norm(build: GraphBuilder, path: str, x: ir.Value, module: str, config: ModelConfig) -> ir.Value:
    attributes = {"axis": -1, "epsilon": config.rms_norm_eps}
    op_type = "RMSNormalization" if build.form.opset >= 23 else "SimplifiedLayerNormalization"
    return build.op(f"{path}/{op_type}", [x, build.vector(names.weight(module))], attributes)[0]


def _skip_norm(
    build: GraphBuilder, x: ir.Value, skip: ir.Value, module: str, config: ModelConfig
) -> tuple[ir.Value, ir.Value]:
    """(normalized, residual sum)."""
    path = f"/{module.replace('.', '/', 1)}"
    if not build.form.fused:
        (total,) = build.op(f"{path}/Add", [x, skip])
        return _rms_norm(build, path, total, module, config), total
    y = build.op(
        f"{path}/SkipSimplifiedLayerNormalization",
        [x, skip, build.vector(names.weight(module))],
        {"epsilon": config.rms_norm_eps},
        MS,
        outputs=4,
    )
    y[1].name = y[2].name = ""
    return y[0], y[3]


def _query_key_value(build: GraphBuilder, config: ModelConfig, i: int, x: ir.Value) -> list[ir.Value | None]:
    """[q, k, v], each [B, S, heads * Dh], or [all packed, None, None]."""
    path = f"/model/layers.{i}/attn"
    prefix = names.layer_module(i, "self_attn")
    if names.weight(f"{prefix}.qkv_proj") in build.layout.units:
        return [build.linear(f"{path}/qkv_proj", x, f"{prefix}.qkv_proj"), None, None]
    q, k, v = (build.linear(f"{path}/{p}", x, f"{prefix}.{p}") for p in names.QKV_PROJECTIONS)
    if config.qk_norm:
        q = _head_norm(build, f"{path}/q_norm", q, f"{prefix}.q_norm", config)
        k = _head_norm(build, f"{path}/k_norm", k, f"{prefix}.k_norm", config)
    return [q, k, v]


def _head_norm(build: GraphBuilder, path: str, x: ir.Value, module: str, config: ModelConfig) -> ir.Value:
    """RMSNorm over each head's Dh channels (qwen3), before RoPE.

    As [B, S * H, Dh]: QNN computes norms of rank 4 wrongly and in silence.
    """
    width = sum(build.layout.units[names.weight(module.replace("_norm", "_proj"))].rows)
    heads = build.constant("/model/constants/per_head", np.array([0, -1, config.head_dim], np.int64))
    flat = build.constant(f"/model/constants/flat_{width}", np.array([0, -1, width], np.int64))
    (split,) = build.op(f"{path}/Reshape.split", [x, heads])
    return build.op(f"{path}/Reshape.join", [_rms_norm(build, path, split, module, config), flat])[0]


def _mlp(build: GraphBuilder, i: int, x: ir.Value) -> ir.Value:
    """[B, S, D] to [B, S, D]. In a form of uint16 every value on the way is: HTP's Swish of it is wrong in silence."""
    path, prefix = f"/model/layers.{i}/mlp", names.layer_module(i, "mlp")
    x = build.rounded(f"{path}/input", x, names.input_of(f"{prefix}.gate_proj"))
    gate = build.linear(f"{path}/gate_proj", x, f"{prefix}.gate_proj")
    up = build.linear(f"{path}/up_proj", x, f"{prefix}.up_proj")
    (sigmoid,) = build.op(f"{path}/Sigmoid", [gate])
    if build.form.qdq:
        sigmoid = build.between(f"{path}/sigmoid", sigmoid, _SIGMOID)
    (silu,) = build.op(f"{path}/Mul.silu", [gate, sigmoid])
    silu = build.rounded(f"{path}/silu", silu, names.output_of(f"{prefix}.act_fn"))
    (product,) = build.op(f"{path}/Mul", [silu, up])
    product = build.rounded(f"{path}/product", product, names.input_of(f"{prefix}.down_proj"))
    return build.linear(f"{path}/down_proj", product, f"{prefix}.down_proj")
