"""What a decoder is made of, from the embedding to the head: the one place where the names of its modules stand.

Which tensors a checkpoint must hold, which linears share an input, what may be rotated, folded or padded, the
reference's steps and the graph's blocks are all views of this description.

A layer is two sublayers, attention and MLP. Each reads the residual stream through a norm and adds to it:
x + last(inner(first(norm(x)))), where `first` are the linears behind the norm and `last` is the one before the sum.
D hidden, H heads, K kv heads, Dh head_dim, V vocab.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from toolkit import names
from toolkit.checkpoint.config import ModelConfig


@dataclass(frozen=True)
class Linear:
    """A matrix [out_features, in_features] under the checkpoint's name of its module, and perhaps a bias."""

    module: str
    in_features: int
    out_features: int
    has_bias: bool = False

    @property
    def weight(self) -> str:
        """Returns the name of its matrix in the checkpoint."""
        return names.weight(self.module)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of its matrix, and of its bias if there is one, by name."""
        matrix: dict[str, tuple[int, ...]] = {self.weight: (self.out_features, self.in_features)}
        return matrix | ({names.bias(self.module): (self.out_features,)} if self.has_bias else {})


@dataclass(frozen=True)
class Norm:
    """An RMSNorm over `width` channels under the checkpoint's name of its module."""

    module: str
    width: int

    @property
    def weight(self) -> str:
        """Returns the name of its gains in the checkpoint."""
        return names.weight(self.module)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of its gains by their name."""
        return {self.weight: (self.width,)}


@dataclass(frozen=True)
class LinearInput:
    """One activation vector of `width` channels: the linears that read it, and the module that writes its channels.

    A scale moved from a channel's readers to its writer changes no output (AWQ, arXiv 2306.00978, section 3.2).
    `writer` is None where nothing linear stands before the input alone. Under grouped-query attention one row of
    v_proj makes `shared` channels of o_proj's input, head by head: channel (k * shared + g) * Dh + d comes from row
    k * Dh + d.
    """

    linears: tuple[Linear, ...]
    writer: Norm | Linear | None
    width: int
    shared: int = 1
    head_dim: int = 1

    @property
    def name(self) -> str:
        """The module that reads it first."""
        return self.linears[0].module

    @property
    def readers(self) -> tuple[str, ...]:
        """The modules whose weight columns it meets."""
        return tuple(linear.module for linear in self.linears)

    @property
    def writers(self) -> tuple[str, ...]:
        """The tensors whose rows, or elements, make its channels."""
        return tuple(self.writer.tensors) if self.writer else ()


@dataclass(frozen=True)
class Attention:
    """The first sublayer. `q_norm` and `k_norm` go over each head before RoPE, in families that have them.

    `window` is how many tokens a query sees, itself included, None for all; `rope` is whether queries and keys are
    rotated by their position. `qkv_proj` is the module that q, k and v become where a graph stacks their rows.
    """

    norm: Norm
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    qkv_proj: str
    normed_input: LinearInput
    inner_input: LinearInput
    window: int | None
    rope: bool

    @property
    def qkv(self) -> tuple[Linear, Linear, Linear]:
        """The linears whose rows are heads; the columns of `o_proj` are."""
        return self.q_proj, self.k_proj, self.v_proj

    @property
    def last(self) -> Linear:
        """The linear whose output is added to the residual stream."""
        return self.o_proj

    @property
    def head_norms(self) -> tuple[Norm, ...]:
        """The norms over heads, none in most families."""
        return tuple(norm for norm in (self.q_norm, self.k_norm) if norm)


@dataclass(frozen=True)
class Mlp:
    """The second sublayer: down_proj(silu(gate_proj(x)) * up_proj(x)); `act_fn` is the name of silu's output."""

    norm: Norm
    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    act_fn: str
    normed_input: LinearInput
    inner_input: LinearInput

    @property
    def linears(self) -> tuple[Linear, Linear, Linear]:
        """Every linear, in the order of the checkpoint."""
        return self.gate_proj, self.up_proj, self.down_proj

    @property
    def last(self) -> Linear:
        """The linear whose output is added to the residual stream."""
        return self.down_proj


Sublayer = Attention | Mlp


@dataclass(frozen=True)
class DecoderLayer:
    """One layer, whose modules' names all begin with `prefix`."""

    index: int
    prefix: str
    attention: Attention
    mlp: Mlp

    @property
    def sublayers(self) -> tuple[Sublayer, Sublayer]:
        """Attention and MLP, in the order they are computed."""
        return self.attention, self.mlp

    @property
    def inputs(self) -> tuple[LinearInput, ...]:
        """Returns what the linears read, in the order in which it is computed."""
        return tuple(given for half in self.sublayers for given in (half.normed_input, half.inner_input))

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear, in the order of the checkpoint."""
        return tuple(linear for given in self.inputs for linear in given.linears)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Every norm, those over heads last."""
        return (self.attention.norm, self.mlp.norm, *self.attention.head_norms)


@dataclass(frozen=True)
class Decoder:
    """The whole model. A tied `head` is the embedding's table [V, D], read as a linear."""

    embedding: Linear
    layers: tuple[DecoderLayer, ...]
    norm: Norm
    head: Linear

    @property
    def head_input(self) -> LinearInput:
        """The final norm's output. A tied head's has no writer: the table's columns are the embedding's too."""
        return LinearInput((self.head,), None if self.head == self.embedding else self.norm, self.norm.width)

    @property
    def inputs(self) -> tuple[LinearInput, ...]:
        """What linears read, in the order it is computed."""
        return (*(given for layer in self.layers for given in layer.inputs), self.head_input)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor by its name."""
        found = self.embedding.tensors | self.norm.tensors | self.head.tensors
        for layer in self.layers:
            for linear in layer.linears:
                found |= linear.tensors
            for norm in layer.norms:
                found |= norm.tensors
        return found

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Every norm of the layers, and the final one."""
        return (*(norm for layer in self.layers for norm in layer.norms), self.norm)


@lru_cache(maxsize=64)
def decoder_of(config: ModelConfig) -> Decoder:
    """Returns the decoder that a config means."""
    D, V = config.hidden_size, config.vocab_size
    embedding = Linear(names.EMBED_TOKENS, D, V)
    return Decoder(
        embedding,
        tuple(_layer(config, index) for index in range(config.num_hidden_layers)),
        Norm(names.FINAL_NORM, D),
        embedding if config.tie_word_embeddings else Linear(names.LM_HEAD, D, V),
    )


def _layer(config: ModelConfig, index: int) -> DecoderLayer:
    prefix = names.layer_module(index, "")
    return DecoderLayer(index, prefix, _attention(config, index, prefix), _mlp(config, prefix))


def _attention(config: ModelConfig, index: int, prefix: str) -> Attention:
    D, Dh, structure = config.hidden_size, config.head_dim, config.structure
    q, k, v = (
        Linear(f"{prefix}self_attn.{name}", D, out_features, structure.qkv_bias)
        for name, out_features in (("q_proj", config.q_size), ("k_proj", config.kv_size), ("v_proj", config.kv_size))
    )
    o = Linear(f"{prefix}self_attn.o_proj", config.q_size, D, structure.o_bias)
    norm = Norm(f"{prefix}input_layernorm", D)
    shared = config.num_attention_heads // config.num_key_value_heads
    return Attention(
        norm,
        q,
        k,
        v,
        o,
        q_norm=Norm(f"{prefix}self_attn.q_norm", Dh) if structure.qk_norm else None,
        k_norm=Norm(f"{prefix}self_attn.k_norm", Dh) if structure.qk_norm else None,
        qkv_proj=f"{prefix}self_attn.qkv_proj",
        normed_input=LinearInput((q, k, v), norm, D),
        inner_input=LinearInput((o,), v, config.q_size, shared, Dh),
        window=structure.sliding_windows[index] if structure.sliding_windows else None,
        rope=index not in structure.layers_without_rope,
    )


def _mlp(config: ModelConfig, prefix: str) -> Mlp:
    D, intermediate, has_bias = config.hidden_size, config.intermediate_size, config.structure.mlp_bias
    gate, up = (Linear(f"{prefix}mlp.{name}", D, intermediate, has_bias) for name in ("gate_proj", "up_proj"))
    down = Linear(f"{prefix}mlp.down_proj", intermediate, D, has_bias)
    norm = Norm(f"{prefix}post_attention_layernorm", D)
    return Mlp(
        norm,
        gate,
        up,
        down,
        act_fn=f"{prefix}mlp.act_fn",
        normed_input=LinearInput((gate, up), norm, D),
        inner_input=LinearInput((down,), up, intermediate),
    )
