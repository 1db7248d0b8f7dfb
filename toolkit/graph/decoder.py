"""The decoder as one ONNX graph over initializers that lie in a data file."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from toolkit import names
from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.graph.attention import Lengths
from toolkit.graph.blocks import embedding, last_rows, layers, lm_head
from toolkit.graph.builder import GraphBuilder, declare, value
from toolkit.graph.cached import CacheShape
from toolkit.graph.layout import Layout
from toolkit.graph.mtp import hidden_input, hidden_output, mtp_input
from toolkit.target import Form


def build_decoder(
    config: ModelConfig, layout: Layout, form: Form, context_length: int, rows: int = 1, feeds_mtp: bool = False
) -> ir.Model:
    """input_ids, attention_mask, position_ids where RoPE needs them, and the KV cache in; logits of each
    row's last position [B, 1, V] and the cache out. More `rows` are logits of as many last positions, in [B, S, V].

    A model that `feeds_mtp` gives its hidden states too, and logits in float16, the one dtype that onnxruntime-genai's
    MtpGenerator reads on the CPU. A head that predicts one more token takes such states, and gives its own.

    Raises UnsupportedError for what GroupQueryAttention cannot do.
    """
    build = GraphBuilder(layout, form)
    ids = value(names.INPUT_IDS, ir.DataType.INT64, ("batch", "sequence"))
    mask = value(names.ATTENTION_MASK, ir.DataType.INT64, ("batch", "total_sequence"))
    seqlens, total, index, tokens, queries = mask_lengths(build, ids, mask)
    positions = None
    if not form.rotary_in_attention:
        positions = value(names.POSITION_IDS, ir.DataType.INT64, ("batch", "sequence"))
    lengths = Lengths(seqlens, total, positions, tokens, queries, mask)
    cache = CacheShape("batch", "past_sequence", "total_sequence")
    embedded, mtp, given = embedding(build, ids), decoder_of(config).mtp, [ids, mask]
    if mtp:
        given.append(hidden_input(build, config))
        embedded = mtp_input(build, config, mtp, embedded, given[-1])
    hidden, past, present = layers(build, config, context_length, embedded, lengths, cache)
    logits = lm_head(build, config, hidden, index) if rows == 1 else last_rows(build, config, hidden, index, rows)
    dtype = ir.DataType.FLOAT16 if feeds_mtp else ir.DataType.FLOAT
    if feeds_mtp:
        logits = build.cast("/lm_head/logits/Cast", logits, dtype)
    declare(logits, names.LOGITS, dtype, ("batch", 1 if rows == 1 else "sequence", config.vocab_size))
    made = [logits]
    if feeds_mtp or mtp:
        made.append(hidden_output(build, config, hidden, names.HIDDEN_STATES_OUT if mtp else names.HIDDEN_STATES))
    given += [] if positions is None else [positions]
    return build.model("decoder", [*given, *past], [*made, *present])


def mask_lengths(build: GraphBuilder, ids: ir.Value, mask: ir.Value) -> tuple[ir.Value, ...]:
    """(seqlens_k int32 [B], total_sequence_length int32 scalar, index of each row's last query int64 [B, 1], the total
    int64 [1], and the number of queries int64 [1]).

    The last query is the last unpadded one, so right-padded batches are right too.
    """
    path = names.LENGTHS_PATH
    one = build.constant(f"{path}/one", np.array([1], np.int64))
    (count,) = build.op(f"{path}/ReduceSum", [mask, one], {"keepdims": 1})
    (last,) = build.op(f"{path}/Sub.last", [count, one])
    (last_flat,) = build.op(f"{path}/Squeeze.last", [last, one])
    seqlens = build.cast(f"{path}/Cast.seqlens", last_flat, ir.DataType.INT32)
    (total,) = build.op(f"{path}/Shape.total", [mask], {"start": 1, "end": 2})
    (total_scalar,) = build.op(f"{path}/Squeeze.total", [total])
    total32 = build.cast(f"{path}/Cast.total", total_scalar, ir.DataType.INT32)
    (queries,) = build.op(f"{path}/Shape.queries", [ids], {"start": 1, "end": 2})
    (past,) = build.op(f"{path}/Sub.past", [total, queries])
    (index,) = build.op(f"{path}/Sub.index", [last, past])
    (bounded,) = build.op(f"{path}/Max", [index, build.constant(f"{path}/zero", np.array([0], np.int64))])
    return seqlens, total32, bounded, total, queries
