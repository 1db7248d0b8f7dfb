"""Which linears read the same activations, and which tensors write the channels of those.

Calibration gathers one set of statistics for each `LinearInput`, and a scale moved from a channel's readers to its
writers changes no output (AWQ, arXiv 2306.00978, section 3.2).
H heads, K kv heads, Dh head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit import names
from toolkit.checkpoint.config import ModelConfig


@dataclass(frozen=True)
class LinearInput:
    """One activation vector of `width` channels.

    `readers` are modules whose weight columns it meets, `writers` tensors whose rows, or elements, make its channels:
    none where nothing linear stands before it alone. Under grouped-query attention one row of v_proj makes `shared`
    channels of o_proj's input, head by head: channel (k * shared + g) * Dh + d comes from row k * Dh + d.
    """

    readers: tuple[str, ...]
    writers: tuple[str, ...]
    width: int
    shared: int = 1
    head_dim: int = 1

    @property
    def name(self) -> str:
        """The module that reads it first."""
        return self.readers[0]


def layer_inputs(config: ModelConfig, layer_index: int) -> tuple[LinearInput, ...]:
    """The four inputs of one layer, in the order they are computed."""

    def module(name: str) -> str:
        return names.layer_module(layer_index, name)

    def rows_of(name: str, has_bias: bool) -> tuple[str, ...]:
        return (names.weight(module(name)), *((names.bias(module(name)),) if has_bias else ()))

    qkv = tuple(module(f"self_attn.{p}") for p in names.QKV_PROJECTIONS)
    norms = ("input_layernorm", "post_attention_layernorm")
    before_qkv, before_mlp = (names.weight(module(norm)) for norm in norms)
    shared = config.num_attention_heads // config.num_key_value_heads
    return (
        LinearInput(qkv, (before_qkv,), config.hidden_size),
        LinearInput(
            (module("self_attn.o_proj"),),
            rows_of("self_attn.v_proj", config.qkv_bias),
            config.q_size,
            shared,
            config.head_dim,
        ),
        LinearInput((module("mlp.gate_proj"), module("mlp.up_proj")), (before_mlp,), config.hidden_size),
        LinearInput((module("mlp.down_proj"),), rows_of("mlp.up_proj", config.mlp_bias), config.intermediate_size),
    )


def head_input(config: ModelConfig) -> LinearInput:
    """The final norm's output. A tied head has no writer: the table's columns are the embedding's too."""
    if config.tie_word_embeddings:
        return LinearInput((names.EMBED_TOKENS,), (), config.hidden_size)
    return LinearInput((names.LM_HEAD,), (names.weight(names.FINAL_NORM),), config.hidden_size)


def linear_inputs(config: ModelConfig) -> list[LinearInput]:
    """Every input of the model, in the order they are computed."""
    layers = [layer_inputs(config, layer_index) for layer_index in range(config.num_hidden_layers)]
    return [given for layer in layers for given in layer] + [head_input(config)]
