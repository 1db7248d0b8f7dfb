"""The decoder as stages that onnxruntime-genai's decoder-pipeline runs: embeddings, context, iterator, lm_head.

S query length: the window in context, 1 in iterator. D hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from toolkit import names
from toolkit.checkpoint.config import ModelConfig
from toolkit.graph.attention import Lengths
from toolkit.graph.blocks import embedding, layers, lm_head
from toolkit.graph.builder import GraphBuilder, declare, value
from toolkit.graph.cached import CacheShape
from toolkit.graph.layout import Layout
from toolkit.quant.ranges import ActivationRange
from toolkit.target import Form

_IDS_SHAPE = (1, "sequence")


@dataclass(frozen=True)
class TransformerPart:
    """A stage's name, which of how many parts of the transformer it is, and its layers."""

    stage: str
    index: int
    count: int
    layers: range


def build_embeddings(config: ModelConfig, layout: Layout, form: Form) -> ir.Model:
    """input_ids [1, S] in, inputs_embeds [1, S, D] out, in the transformer's dtype."""
    build = GraphBuilder(layout, form)
    ids = value(names.INPUT_IDS, ir.DataType.INT64, _IDS_SHAPE)
    rows = declare(embedding(build, ids), names.EMBEDDED, build.dtype, (*_IDS_SHAPE, config.hidden_size))
    return build.model(names.EMBEDDINGS, [ids], [rows])


def build_transformer(
    config: ModelConfig,
    layout: Layout,
    form: Form,
    context_length: int,
    part: TransformerPart,
    sequence_length: int,
    ranges: Mapping[str, ActivationRange] | None = None,
) -> ir.Model:
    """Hidden states [1, S, D], the lengths and its layers' KV cache in; hidden states [1, S, D] and the cache out.

    The first part takes inputs_embeds, the last gives last_hidden_states, normalized; between them goes the residual.

    past_seq_len int32 [1, 1] is the index of the last valid position and total_seq_len int32 [1] the cache's length:
    GroupQueryAttention's own meaning, and what onnxruntime-genai gives a windowed pipeline. `ranges` by point are for a
    form of uint16. Raises UnsupportedError for what GroupQueryAttention cannot do.
    """
    build = GraphBuilder(layout, form, ranges)
    shape = (1, sequence_length or "sequence", config.hidden_size)
    rows = value(names.part_input(part.index), build.dtype, shape)
    seqlens_k = value(names.PAST_SEQ_LEN, ir.DataType.INT32, (1, 1))
    total = value(names.TOTAL_SEQ_LEN, ir.DataType.INT32, (1,))
    fixed = CacheShape(1, context_length, context_length, part.layers)
    cache = fixed if form.static_cache else CacheShape(1, "past_sequence", "total_sequence", part.layers)
    hidden, past, present = layers(build, config, context_length, rows, Lengths(seqlens_k, total), cache)
    declare(hidden, names.part_output(part.index, part.count), build.dtype, shape)
    return build.model(part.stage, [rows, seqlens_k, total, *past], [hidden, *present])


def build_lm_head(config: ModelConfig, layout: Layout, form: Form, pad_token_id: int) -> ir.Model:
    """last_hidden_states [1, S, D] and input_ids [1, S] in, logits [1, 1, V] of the last token that is no pad out.

    onnxruntime-genai pads the last window of a prompt at its end, and a pad id never stands in text, so the ids tell
    which position the next token follows; one row of logits is computed instead of a window of them.
    """
    build = GraphBuilder(layout, form)
    hidden = value(names.LAST_HIDDEN, build.dtype, (*_IDS_SHAPE, config.hidden_size))
    ids = value(names.INPUT_IDS, ir.DataType.INT64, _IDS_SHAPE)
    pad = build.constant(f"{names.LAST_POSITION_PATH}/pad_token_id", np.array(pad_token_id, np.int64))
    (is_pad,) = build.op(f"{names.LAST_POSITION_PATH}/Equal", [ids, pad])
    (is_token,) = build.op(f"{names.LAST_POSITION_PATH}/Not", [is_pad])
    marks = build.cast(f"{names.LAST_POSITION_PATH}/Cast.marks", is_token, ir.DataType.INT32)
    (index,) = build.op(
        f"{names.LAST_POSITION_PATH}/ArgMax", [marks], {"axis": 1, "keepdims": 1, "select_last_index": 1}
    )
    logits = lm_head(build, config, hidden, index)
    declare(logits, names.LOGITS, ir.DataType.FLOAT, (1, 1, config.vocab_size))
    return build.model(names.HEAD, [hidden, ids], [logits])
