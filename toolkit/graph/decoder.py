"""The decoder as one ONNX graph over initializers that lie in a data file: llama, mistral, qwen2, qwen3.

B batch, S query length, T total length, D hidden, H heads, K kv heads, Dh head_dim, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from toolkit import names
from toolkit.checkpoint.config import ModelConfig
from toolkit.errors import UnsupportedError
from toolkit.graph.layout import Layout, Slot
from toolkit.graph.rope import rotary_caches

_MS = "com.microsoft"
# GroupQueryAttention's rotary kernel refuses other widths.
HEAD_DIM_MULTIPLE: Final = 16
_DTYPES = {"float32": ir.DataType.FLOAT, "uint8": ir.DataType.UINT8}


class GraphBuilder:
    """Collects nodes and initializers; a node's path names its outputs `{path}/output_{k}`."""

    def __init__(self, layout: Layout, data_file: str) -> None:
        self.layout = layout
        self.data_file = data_file
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}

    def op(
        self,
        path: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        domain: str = "",
        outputs: int = 1,
    ) -> list[ir.Value]:
        """Appends a node; the last part of `path` before any `.` is its op type. Returns its outputs."""
        values = [ir.Value(name=f"{path}/output_{k}") for k in range(outputs)]
        node = ir.node(
            path.rsplit("/", 1)[-1].split(".")[0],
            list(inputs),
            attributes or {},
            domain=domain,
            outputs=values,
            name=path,
        )
        self.nodes.append(node)
        return values

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """A small initializer inside the graph file, shared by name."""
        if name not in self.initializers:
            value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            self.initializers[name] = value
        return self.initializers[name]

    def slot(self, slot: Slot) -> ir.Value:
        """An initializer in the data file."""
        if slot.name not in self.initializers:
            tensor = ir.ExternalTensor(
                self.data_file, slot.offset, slot.nbytes, _DTYPES[slot.dtype],
                shape=ir.Shape(slot.shape), name=slot.name,
            )  # fmt: skip
            self.initializers[slot.name] = ir.Value(name=slot.name, const_value=tensor)
        return self.initializers[slot.name]

    def vector(self, tensor: str) -> ir.Value:
        """A float32 initializer by its tensor name."""
        return self.slot(self.layout.units[tensor].slots[0])

    def linear(self, path: str, x: ir.Value, module: str, weight_of: str | None = None) -> ir.Value:
        """`x` times a module's weight, plus its bias if it has one. MatMulNBits, or FusedMatMul in float32."""
        unit = self.layout.units[names.weight(weight_of or module)]
        bias = names.bias(module)
        bias_value = self.vector(bias) if bias in self.layout.units else None
        if unit.spec is None:
            (y,) = self.op(f"{path}/FusedMatMul", [x, self.slot(unit.slots[0])], {"transB": 1}, _MS)
            return self.op(f"{path}/Add", [y, bias_value])[0] if bias_value else y
        attributes = {
            "K": unit.width, "N": sum(unit.rows), "bits": unit.spec.bits,
            "block_size": unit.spec.block_size, "accuracy_level": 4,
        }  # fmt: skip
        weights: list[ir.Value | None] = [self.slot(slot) for slot in unit.slots]
        inputs = [x, *weights]
        if bias_value:
            inputs = [x, *weights, *[None] * (4 - len(weights)), bias_value]
        return self.op(f"{path}/MatMulNBits", inputs, attributes, _MS)[0]

    def embedding(self, ids: ir.Value) -> ir.Value:
        """[B, S] ids to [B, S, D]."""
        unit = self.layout.units[names.weight(names.EMBED_TOKENS)]
        path = "/model/embed_tokens"
        if unit.spec is None:
            return self.op(f"{path}/Gather", [self.slot(unit.slots[0]), ids])[0]
        packed = unit.slots[0]
        rows, blocks, block_bytes = packed.shape
        # A tied head reads the same bytes as [V, J, block]; the embedding wants them flat.
        flat = self.slot(replace(packed, name=f"{packed.name}.flat", shape=(rows, blocks * block_bytes)))
        scales, *zero_points = [self.slot(slot) for slot in unit.slots[1:]]
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": unit.spec.block_size, "bits": unit.spec.bits}
        return self.op(f"{path}/GatherBlockQuantized", [flat, ids, scales, *zero_points], attributes, _MS)[0]


def build_decoder(config: ModelConfig, layout: Layout, data_file: str, context_length: int) -> ir.Model:
    """input_ids, attention_mask and the KV cache in; logits of each row's last position [B, 1, V] and the cache out.

    Raises UnsupportedError for a head_dim that ORT's GroupQueryAttention refuses.
    """
    if config.head_dim % HEAD_DIM_MULTIPLE:
        raise UnsupportedError(
            f"head_dim {config.head_dim} is not a multiple of {HEAD_DIM_MULTIPLE}, which GroupQueryAttention needs"
        )
    build = GraphBuilder(layout, data_file)
    ids = _value(names.INPUT_IDS, ir.DataType.INT64, ("batch", "sequence"))
    mask = _value(names.ATTENTION_MASK, ir.DataType.INT64, ("batch", "total_sequence"))
    inputs, outputs = [ids, mask], []
    lengths = _lengths(build, ids, mask)
    caches = rotary_caches(config, context_length)
    rotary = [build.constant(f"/model/rotary/{n}_cache", c) for n, c in zip(("cos", "sin"), caches, strict=True)]
    residual = build.embedding(ids)
    hidden = _rms_norm(build, "/model/layers.0/input_layernorm", residual, "model.layers.0.input_layernorm", config)
    for i in range(config.num_hidden_layers):
        shape = ("batch", config.num_key_value_heads, "past_sequence", config.head_dim)
        past = [_value(n(i), ir.DataType.FLOAT, shape) for n in (names.past_key, names.past_value)]
        inputs += past
        attended, present = _attention(build, config, i, hidden, [*past, lengths[0], lengths[1], *rotary])
        for value, name in zip(present, (names.present_key(i), names.present_value(i)), strict=True):
            _declare(value, name, ir.DataType.FLOAT, (shape[0], shape[1], "total_sequence", shape[3]))
        outputs += present
        module = names.layer_module(i, "post_attention_layernorm")
        hidden, residual = _skip_norm(build, f"/{module.replace('.', '/', 1)}", attended, residual, module, config)
        after = names.layer_module(i + 1, "input_layernorm") if i + 1 < config.num_hidden_layers else names.FINAL_NORM
        mlp = _mlp(build, i, hidden)
        hidden, residual = _skip_norm(build, f"/{after.replace('.', '/', 1)}", mlp, residual, after, config)
    last = _last_position(build, hidden, lengths[2])
    head = names.EMBED_TOKENS if config.tie_word_embeddings else names.LM_HEAD
    logits = build.linear("/lm_head", last, names.LM_HEAD, weight_of=head)
    _declare(logits, names.LOGITS, ir.DataType.FLOAT, ("batch", 1, config.vocab_size))
    graph = ir.Graph(
        inputs, [logits, *outputs], nodes=build.nodes, initializers=_named(build.initializers),
        opset_imports={"": 23, _MS: 1}, name="decoder",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10, producer_name="toolkit")


def save_graph(model: ir.Model, path: Path) -> None:
    """Writes the graph alone; its external data is where the slots say."""
    ir.save(model, path)


def _named(initializers: dict[str, ir.Value]) -> list[ir.Value]:
    for value in initializers.values():
        tensor = value.const_value
        assert tensor is not None
        value.shape, value.dtype = tensor.shape, tensor.dtype  # type: ignore[assignment]
    return list(initializers.values())


def _value(name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _declare(value: ir.Value, name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> None:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)


def _lengths(build: GraphBuilder, ids: ir.Value, mask: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(seqlens_k int32 [B], total_sequence_length int32 scalar, index of each row's last query int64 [B, 1])."""
    path = "/model/lengths"
    one = build.constant(f"{path}/one", np.array([1], np.int64))
    (count,) = build.op(f"{path}/ReduceSum", [mask, one], {"keepdims": 1})
    (last,) = build.op(f"{path}/Sub.last", [count, one])
    (last_flat,) = build.op(f"{path}/Squeeze.last", [last, one])
    (seqlens,) = build.op(f"{path}/Cast.seqlens", [last_flat], {"to": ir.DataType.INT32.value})
    (total,) = build.op(f"{path}/Shape.total", [mask], {"start": 1, "end": 2})
    (total_scalar,) = build.op(f"{path}/Squeeze.total", [total])
    (total32,) = build.op(f"{path}/Cast.total", [total_scalar], {"to": ir.DataType.INT32.value})
    (queries,) = build.op(f"{path}/Shape.queries", [ids], {"start": 1, "end": 2})
    (past,) = build.op(f"{path}/Sub.past", [total, queries])
    (index,) = build.op(f"{path}/Sub.index", [last, past])
    (bounded,) = build.op(f"{path}/Max", [index, build.constant(f"{path}/zero", np.array([0], np.int64))])
    return seqlens, total32, bounded


def _last_position(build: GraphBuilder, hidden: ir.Value, index: ir.Value) -> ir.Value:
    """[B, S, D] to [B, 1, D] at each row's last unpadded query, so right-padded batches are right too."""
    (row,) = build.op("/lm_head/GatherND", [hidden, index], {"batch_dims": 1})
    return build.op("/lm_head/Unsqueeze", [row, build.constant("/lm_head/axis", np.array([1], np.int64))])[0]


def _rms_norm(build: GraphBuilder, path: str, x: ir.Value, module: str, config: ModelConfig) -> ir.Value:
    attributes = {"axis": -1, "epsilon": config.rms_norm_eps}
    return build.op(f"{path}/RMSNormalization", [x, build.vector(names.weight(module))], attributes)[0]


def _skip_norm(
    build: GraphBuilder, path: str, x: ir.Value, skip: ir.Value, module: str, config: ModelConfig
) -> tuple[ir.Value, ir.Value]:
    """(normalized, residual sum)."""
    y = build.op(
        f"{path}/SkipSimplifiedLayerNormalization", [x, skip, build.vector(names.weight(module))],
        {"epsilon": config.rms_norm_eps}, _MS, outputs=4,
    )  # fmt: skip
    y[1].name = y[2].name = ""
    return y[0], y[3]


def _attention(
    build: GraphBuilder, config: ModelConfig, i: int, x: ir.Value, rest: list[ir.Value]
) -> tuple[ir.Value, list[ir.Value]]:
    path = f"/model/layers.{i}/attn"
    prefix = names.layer_module(i, "self_attn")
    query: list[ir.Value | None]
    if names.weight(f"{prefix}.qkv_proj") in build.layout.units:
        query = [build.linear(f"{path}/qkv_proj", x, f"{prefix}.qkv_proj"), None, None]
    else:
        q, k, v = (build.linear(f"{path}/{p}", x, f"{prefix}.{p}") for p in ("q_proj", "k_proj", "v_proj"))
        if config.qk_norm:
            q = _head_norm(build, f"{path}/q_norm", q, f"{prefix}.q_norm", config)
            k = _head_norm(build, f"{path}/k_norm", k, f"{prefix}.k_norm", config)
        query = [q, k, v]
    attributes = {
        "num_heads": config.num_attention_heads, "kv_num_heads": config.num_key_value_heads,
        "scale": config.rotary_head_dim**-0.5, "do_rotary": 1, "local_window_size": config.sliding_windows[i] or -1,
    }  # fmt: skip
    y, *present = build.op(f"{path}/GroupQueryAttention", [*query, *rest], attributes, _MS, outputs=3)
    return build.linear(f"{path}/o_proj", y, f"{prefix}.o_proj"), present


def _head_norm(build: GraphBuilder, path: str, x: ir.Value, module: str, config: ModelConfig) -> ir.Value:
    """RMSNorm over each head's Dh channels (qwen3), before RoPE."""
    heads = build.constant("/model/constants/per_head", np.array([0, 0, -1, config.head_dim], np.int64))
    flat = build.constant("/model/constants/flat", np.array([0, 0, -1], np.int64))
    (split,) = build.op(f"{path}/Reshape.split", [x, heads])
    return build.op(f"{path}/Reshape.join", [_rms_norm(build, path, split, module, config), flat])[0]


def _mlp(build: GraphBuilder, i: int, x: ir.Value) -> ir.Value:
    path, prefix = f"/model/layers.{i}/mlp", names.layer_module(i, "mlp")
    gate = build.linear(f"{path}/gate_proj", x, f"{prefix}.gate_proj")
    up = build.linear(f"{path}/up_proj", x, f"{prefix}.up_proj")
    (sigmoid,) = build.op(f"{path}/Sigmoid", [gate])
    (silu,) = build.op(f"{path}/Mul.silu", [gate, sigmoid])
    (product,) = build.op(f"{path}/Mul", [silu, up])
    return build.linear(f"{path}/down_proj", product, f"{prefix}.down_proj")
