"""What a decoder is made of, from the embedding to the head: the one place where the names of its modules stand.

Which tensors a checkpoint must hold, which linears share an input, what may be rotated, folded or padded, the
reference's steps and the graph's blocks are all views of this description.

A layer is two sublayers, attention and MLP. Each reads the residual stream through a norm and adds to it:
x + last(inner(first(norm(x)))), where `first` are the linears behind the norm and `last` is the one before the sum.
D hidden, H heads, K kv heads, Dh head_dim, V vocab.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Final

from toolkit import names
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.family import DeltaNet, Experts, Latent
from toolkit.checkpoint.linears import Linear, LinearInput, Norm
from toolkit.checkpoint.sublayers import Attention, Expert, LatentAttention, LinearAttention, Mixer, Mlp, Moe

# Of the norms over latents, whatever the config says of the others (modeling_deepseek_v3.py of transformers).
_LATENT_EPS: Final = 1e-6


@dataclass(frozen=True)
class DecoderLayer:
    """One layer, whose modules' names all begin with `prefix`."""

    index: int
    prefix: str
    attention: Mixer
    mlp: Mlp | Moe

    @property
    def sublayers(self) -> tuple[Mixer, Mlp | Moe]:
        """Attention and MLP, in the order they are computed."""
        return self.attention, self.mlp

    @property
    def inputs(self) -> tuple[LinearInput, ...]:
        """Returns what the linears read, in the order in which it is computed."""
        return tuple(given for half in self.sublayers for given in half.inputs)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear, in the order of the checkpoint, those that are never quantized last."""
        read = tuple(linear for given in self.inputs for linear in given.linears)
        return (*read, *(linear for half in self.sublayers for linear in half.exact_linears))

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Every norm, those over heads last."""
        return (self.attention.norm, self.mlp.norm, *self.output_norms, *self.attention.head_norms)

    @property
    def output_norms(self) -> tuple[Norm, ...]:
        """The norms behind sublayers, none in most families."""
        halves = [half for half in self.sublayers if not isinstance(half, Moe)]
        return tuple(half.output_norm for half in halves if half.output_norm)


@dataclass(frozen=True)
class MtpInput:
    """What a head that predicts one more token reads in place of the embedding: `eh_proj` of the next token's embedding
    through `enorm` and the model's hidden state through `hnorm`, side by side in this order."""

    enorm: Norm
    hnorm: Norm
    eh_proj: Linear

    @property
    def given(self) -> LinearInput:
        """Returns what eh_proj reads. Two norms write it, so that nothing is folded into one."""
        return LinearInput((self.eh_proj,), None, self.eh_proj.in_features)


@dataclass(frozen=True)
class Decoder:
    """The whole model. A tied `head` is the embedding's table [V, D], read as a linear. `is_merged` is whether a
    checkpoint has linears that read the same in one tensor. `mtp` is what a head that predicts one more token has
    before its layer, None in a model."""

    embedding: Linear
    layers: tuple[DecoderLayer, ...]
    norm: Norm
    head: Linear
    head_dim: int
    is_merged: bool = False
    mtp: MtpInput | None = None

    @property
    def gated(self) -> tuple[Attention, ...]:
        """Returns the attentions whose output is gated: a checkpoint has the gate's rows in q_proj."""
        attentions = (layer.attention for layer in self.layers)
        return tuple(one for one in attentions if isinstance(one, Attention) and one.gate_proj)

    @property
    def merged(self) -> dict[str, tuple[Linear, ...]]:
        """Returns the linears whose rows a checkpoint has in one tensor, one behind the other, by that one's module."""
        found: dict[str, tuple[Linear, ...]] = {}
        for layer in self.layers if self.is_merged else ():
            if isinstance(layer.attention, Attention):
                found[layer.attention.qkv_proj] = layer.attention.qkv
            found[f"{layer.prefix}mlp.gate_up_proj"] = layer.mlp.first
        return found

    @property
    def head_input(self) -> LinearInput:
        """The final norm's output. A tied head's has no writer: the table's columns are the embedding's too."""
        return LinearInput((self.head,), None if self.head == self.embedding else self.norm, self.norm.width)

    @cached_property
    def inputs(self) -> tuple[LinearInput, ...]:
        """What linears read, in the order it is computed."""
        first = (self.mtp.given,) if self.mtp else ()
        return (*first, *(given for layer in self.layers for given in layer.inputs), self.head_input)

    @cached_property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor by its name."""
        found = self.embedding.tensors | self.norm.tensors | self.head.tensors
        if self.mtp:
            found |= self.mtp.enorm.tensors | self.mtp.hnorm.tensors | self.mtp.eh_proj.tensors
        for layer in self.layers:
            for linear in layer.linears:
                found |= linear.tensors
            for norm in layer.norms:
                found |= norm.tensors
            if isinstance(layer.mlp, Moe) and layer.mlp.routing.groups:
                found[layer.mlp.choice_bias] = (layer.mlp.routing.count,)
            if layer.attention.sinks and isinstance(layer.attention, Attention):
                found[layer.attention.sinks] = (layer.attention.q_proj.out_features // self.head_dim,)
            if isinstance(layer.attention, LinearAttention):
                found |= layer.attention.vectors
        return found

    @cached_property
    def exact_matrices(self) -> frozenset[str]:
        """The tensors of the linears that are never quantized."""
        return frozenset(linear.weight for layer in self.layers for linear in layer.linears if linear.exact)

    @property
    def moes(self) -> tuple[Moe, ...]:
        """Returns the sublayers that have experts, in the order of their layers."""
        return tuple(layer.mlp for layer in self.layers if isinstance(layer.mlp, Moe))

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Every norm of the layers, the final one, and those before the layer of an MTP head."""
        before = (self.mtp.enorm, self.mtp.hnorm) if self.mtp else ()
        return (*(norm for layer in self.layers for norm in layer.norms), self.norm, *before)


def stored_tensors(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor as the checkpoint has it, by name: those of a layer's experts may be one, and
    so may those of linears that read the same."""
    found = dict(decoder.tensors)
    for module, linears in decoder.merged.items():
        found[names.weight(module)] = (sum(linear.out_features for linear in linears), linears[0].in_features)
        for linear in linears:
            del found[linear.weight]
    for attention in decoder.gated:
        assert attention.gate_proj
        for query, gate in zip(attention.q_proj.tensors, attention.gate_proj.tensors, strict=True):
            found[query] = (2 * found[query][0], *found.pop(gate)[1:])
    for moe in decoder.moes:
        if not moe.routing.stacked:
            continue
        for module, given in moe.stacks().items():
            first = given[0][0]
            width = first.out_features * len(given[0])
            found[module] = (len(given), first.in_features, width)
            if first.has_bias:
                found[f"{module}_bias"] = (len(given), width)
            for linear in (linear for linears in given for linear in linears):
                for tensor in linear.tensors:
                    del found[tensor]
    return found


@lru_cache(maxsize=64)
def decoder_of(config: ModelConfig) -> Decoder:
    """Returns the decoder that a config means; none that is traced, whose layers are not known."""
    assert not config.traced, f"{config.model_type} is traced, its layers are transformers' to know"
    D, V = config.hidden_size, config.vocab_size
    embedding = Linear(names.EMBED_TOKENS, D, V)
    return Decoder(
        embedding,
        tuple(_layer(config, index) for index in range(config.num_hidden_layers)),
        Norm(names.FINAL_NORM, D),
        embedding if config.tie_word_embeddings else Linear(names.LM_HEAD, D, V),
        config.head_dim,
        config.structure.merged,
        None if config.structure.mtp_layer is None else _mtp_input(D),
    )


def _mtp_input(D: int) -> MtpInput:
    enorm, hnorm = (Norm(names.layer_module(0, module), D) for module in ("enorm", "hnorm"))
    return MtpInput(enorm, hnorm, Linear(names.layer_module(0, "eh_proj"), 2 * D, D))


def _layer(config: ModelConfig, index: int) -> DecoderLayer:
    prefix = names.layer_module(index, "")
    experts = config.structure.experts
    mlp = _moe(config, experts, prefix) if experts and index not in experts.dense_layers else _mlp(config, prefix)
    return DecoderLayer(index, prefix, _mixer(config, index, prefix), mlp)


def _mixer(config: ModelConfig, index: int, prefix: str) -> Mixer:
    latent, delta_net = config.structure.latent, config.structure.delta_net
    if delta_net and index in delta_net.layers:
        return _linear_attention(config, delta_net, prefix)
    return _latent(config, latent, prefix) if latent else _attention(config, index, prefix)


def _linear_attention(config: ModelConfig, shape: DeltaNet, prefix: str) -> LinearAttention:
    D, heads, of = config.hidden_size, shape.linear_num_value_heads, f"{prefix}linear_attn."
    return LinearAttention(
        Norm(f"{prefix}input_layernorm", D),
        Linear(f"{of}in_proj_qkv", D, shape.conv_size),
        Linear(f"{of}in_proj_z", D, shape.value_size),
        Linear(f"{of}in_proj_b", D, heads, exact=True),
        Linear(f"{of}in_proj_a", D, heads, exact=True),
        Linear(f"{of}out_proj", shape.value_size, D),
        conv1d=names.weight(f"{of}conv1d"),
        dt_bias=f"{of}dt_bias",
        A_log=f"{of}A_log",
        gated_norm=names.weight(f"{of}norm"),
        shape=shape,
    )


def _attention(config: ModelConfig, index: int, prefix: str) -> Attention:
    D, Dh, structure = config.hidden_size, config.head_dim, config.structure
    q, k, v = (
        Linear(f"{prefix}self_attn.{name}", D, out_features, structure.qkv_bias)
        for name, out_features in (("q_proj", config.q_size), ("k_proj", config.kv_size), ("v_proj", config.kv_size))
    )
    o = Linear(f"{prefix}self_attn.o_proj", config.q_size, D, structure.o_bias)
    # A name of its own: a checkpoint has its rows in q_proj.
    gate = Linear(f"{prefix}self_attn.q_gate_proj", D, config.q_size, structure.qkv_bias)
    gates = (gate,) if structure.output_gate else ()
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
        kv_proj=f"{prefix}self_attn.kv_proj",
        normed_input=LinearInput((q, k, v, *gates), norm, D),
        inner_input=LinearInput((o,), v, config.q_size, shared, Dh),
        window=structure.sliding_windows[index] if structure.sliding_windows else None,
        rope=index not in structure.layers_without_rope,
        sinks=f"{prefix}self_attn.sinks" if structure.sinks else None,
        output_norm=Norm(f"{prefix}post_attention_layernorm", D) if structure.output_norms else None,
        gate_proj=gate if gates else None,
    )


def _latent(config: ModelConfig, latent: Latent, prefix: str) -> LatentAttention:
    D, H, of = config.hidden_size, config.num_attention_heads, f"{prefix}self_attn."
    heads, rank, biased = H * latent.qk_head_dim, latent.q_lora_rank, config.structure.qkv_bias
    return LatentAttention(
        Norm(f"{prefix}input_layernorm", D),
        Linear(f"{of}q_a_proj", D, rank, biased) if rank else None,
        Norm(f"{of}q_a_layernorm", rank, _LATENT_EPS) if rank else None,
        Linear(f"{of}q_b_proj", rank, heads) if rank else Linear(f"{of}q_proj", D, heads),
        Linear(f"{of}kv_a_proj_with_mqa", D, latent.kv_lora_rank + latent.qk_rope_head_dim, biased),
        Norm(f"{of}kv_a_layernorm", latent.kv_lora_rank, _LATENT_EPS),
        Linear(f"{of}kv_b_proj", latent.kv_lora_rank, H * (latent.qk_nope_head_dim + latent.v_head_dim)),
        Linear(f"{of}o_proj", H * latent.v_head_dim, D, config.structure.o_bias),
        latent,
    )


def _mlp(config: ModelConfig, prefix: str, of: str = "mlp", width: int = 0) -> Mlp:
    D, intermediate, has_bias = config.hidden_size, width or config.intermediate_size, config.structure.mlp_bias
    gate, up = (Linear(f"{prefix}{of}.{name}", D, intermediate, has_bias) for name in ("gate_proj", "up_proj"))
    down = Linear(f"{prefix}{of}.down_proj", intermediate, D, has_bias)
    framed = config.structure.output_norms
    norm = Norm(f"{prefix}{'pre_feedforward_layernorm' if framed else 'post_attention_layernorm'}", D)
    return Mlp(
        norm,
        gate,
        up,
        down,
        act_fn=f"{prefix}mlp.act_fn",
        normed_input=LinearInput((gate, up), norm, D),
        inner_input=LinearInput((down,), up, intermediate),
        activation=config.structure.activation,
        output_norm=Norm(f"{prefix}post_feedforward_layernorm", D) if framed else None,
    )


def _moe(config: ModelConfig, experts: Experts, prefix: str) -> Moe:
    D, shared = config.hidden_size, experts.shared_intermediate_size
    return Moe(
        Norm(f"{prefix}post_attention_layernorm", D),
        Linear(f"{prefix}mlp.{experts.router}", D, experts.count, experts.biased, exact=True),
        tuple(_expert(f"{prefix}mlp.experts.{k}.", D, experts) for k in range(experts.count)),
        experts,
        gate_up_proj=f"{prefix}mlp.experts.gate_up_proj",
        down_proj=f"{prefix}mlp.experts.down_proj",
        shared=_shared_experts(config, prefix, shared) if shared else None,
    )


def _shared_experts(config: ModelConfig, prefix: str, width: int) -> Mlp:
    """The MLP that every token goes through. Router and experts read the same norm, so it is not folded into."""
    mlp = _mlp(config, prefix, "mlp.shared_experts", width)
    return replace(mlp, normed_input=replace(mlp.normed_input, writer=None))


def _expert(prefix: str, D: int, experts: Experts) -> Expert:
    width, biased = experts.intermediate_size, experts.biased
    gate, up = (Linear(f"{prefix}{name}", D, width, biased) for name in ("gate_proj", "up_proj"))
    down = Linear(f"{prefix}down_proj", width, D, biased)
    return Expert(
        gate,
        up,
        down,
        # The norm before it is every expert's and the router's: nothing is moved into it for one. Nor is anything into
        # up, since what few tokens show of a channel would not be worth it.
        normed_input=LinearInput((gate, up), None, D, routed=True),
        inner_input=LinearInput((down,), None, width, routed=True),
    )
