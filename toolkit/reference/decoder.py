"""The oracle: the checkpoint's own forward pass in float32, one layer resident at a time, on numpy or another device.

Shares the config, its anatomy and the weight source with the graphs and nothing else, so that agreement means
something: how a norm, a head or a position is computed stands here once more. Sequences come and go as numpy's arrays;
within a layer they are its device's.
B is 1 throughout; T tokens, D hidden, H heads, K kv heads, G = H/K, Dh head_dim, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.checkpoint.anatomy import DecoderLayer, decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.family import GELU_TANH, Experts
from toolkit.checkpoint.linears import Linear, LinearInput, Norm
from toolkit.checkpoint.sublayers import Attention, Expert, LatentAttention, LinearAttention, Mixer, Mlp, Moe, Sublayer
from toolkit.checkpoint.weights import Tensors
from toolkit.device.arrays import NUMPY, Device, device_of
from toolkit.device.fitting import TOGETHER
from toolkit.reference.attention import attend
from toolkit.reference.delta_rule import DeltaState, convolved, delta_rule, silu
from toolkit.reference.rotation import rotate, rotate_neighbours, rotation
from toolkit.reference.routing import Chosen, Elsewhere, chosen_experts, routed, routed_by_groups

Array = NDArray[np.float32]
# Of a head at once, at most so many rows and so many weights; who remembers rows has them if it asks for as many.
HEAD_ROWS: Final = 16384
ROWS_ELEMENTS: Final = 1 << 25
# Columns of logits that are made at once.
_COLUMNS: Final = 4096
# 0.5 (1 + tanh(a)) is the sigmoid of 2 a, and GELU's tanh form has sqrt(2 / pi) in a.
_GELU: Final = 2 * math.sqrt(2 / math.pi)
# Sees what a linear's input is, and gives it back.
Look = Callable[[LinearInput, Array], Array]


def unseen(_: LinearInput, values: Array) -> Array:
    """Gives back what a linear reads, and does nothing with it."""
    return values


def reference_logits(
    config: ModelConfig, source: Tensors, sequences: list[list[int]], on: Device = NUMPY
) -> list[Array]:
    """Logits [T, V] of every position of each sequence. Each weight is read once for all of them."""
    return [head_logits(config, source, x, on) for x in reference_hidden(config, source, sequences, on=on)]


def reference_hidden(
    config: ModelConfig,
    source: Tensors,
    sequences: list[list[int]],
    progress: Callable[[str], None] = lambda _: None,
    on: Device = NUMPY,
) -> list[Array]:
    """The final norm's output [T, D] of each sequence, one layer's weights in memory at a time.

    `progress` is called with the name of each finished layer.
    """
    hidden = [embed(source, ids) for ids in sequences]
    for layer_index in range(config.num_hidden_layers):
        hidden = through_layer(read_layer(config, source, layer_index, on), hidden)
        progress(f"layer {layer_index}")
    norm = source.read(decoder_of(config).norm.weight)
    return [rms_norm(x, norm, config.stream_eps) for x in hidden]


def through_layer(layer: Layer, pieces: Sequence[Array], tokens: int = TOGETHER) -> list[Array]:
    """Each of numpy's sequences [T, D] through a layer, as many at a time as make so many tokens."""
    sizes, waiting = [x.shape[0] for x in pieces], iter(pieces)
    batches = (
        (layer.on.from_host(np.concatenate([next(waiting) for _ in lengths])), lengths)
        for lengths in batched(sizes, tokens)
    )
    done = np.concatenate([layer.on.to_host(x) for x in by_batches(layer, batches)])
    return np.split(done, np.cumsum(sizes)[:-1])


def by_batches(layer: Layer, batches: Iterable[tuple[Array, tuple[int, ...]]], look: Look = unseen) -> Iterator[Array]:
    """Sequences behind a layer, [T, D] of each batch, or of all together where the layer has experts: these are read
    from the checkpoint one after the other, so each sees its tokens of the whole text at once."""
    attention, mlp = layer.anatomy.sublayers
    passed = (layer.through(attention, x, lengths, look) for x, lengths in batches)
    together = iter([layer.on.concatenate(list(passed))]) if isinstance(mlp, Moe) else passed
    return (layer.through(mlp, x, look=look) for x in together)


def batched(lengths: Sequence[int], tokens: int = TOGETHER) -> list[tuple[int, ...]]:
    """Lengths of sequences in order, as many together as make so many tokens: matrix products want many rows."""
    groups: list[list[int]] = []
    for length in lengths:
        if groups and sum(groups[-1]) + length <= tokens:
            groups[-1].append(length)
        else:
            groups.append([length])
    return [tuple(group) for group in groups]


def embed(source: Tensors, ids: list[int]) -> Array:
    """Rows [T, D] of the embedding, read one by one: the table of a large model does not fit beside a layer."""
    name = names.weight(names.EMBED_TOKENS)
    rows = {i: source.read_rows(name, i, i + 1)[0] for i in set(ids)}
    return np.stack([rows[i] for i in ids])


def head_logits(config: ModelConfig, source: Tensors, hidden: Array, on: Device = NUMPY) -> Array:
    """numpy's [T, D] to [T, V], the head read by rows."""
    logits = np.empty((hidden.shape[0], config.vocab_size), np.float32)
    start, hidden = 0, on.from_host(hidden)
    for rows in head_rows(config, source):
        add_logits(logits, start, hidden, rows, on)
        start += rows.shape[0]
    return logits


def add_logits(logits: Array, start: int, hidden: Array, rows: Array, on: Device) -> None:
    """Writes into numpy's `logits` [T, V], from column `start` on, the products of the device's `hidden` [T, D] with
    numpy's `rows` [n, D] of the head."""
    moved = on.from_host(rows)
    for first in range(0, rows.shape[0], _COLUMNS):
        some = moved[first : first + _COLUMNS]
        on.write_product(logits[:, start + first : start + first + some.shape[0]], hidden, some.T)


def head_rows(config: ModelConfig, source: Tensors) -> Iterator[Array]:
    """The head from its first row to its last, some [rows, D] at a time."""
    name, step = decoder_of(config).head.weight, head_step(config)
    for start in range(0, config.vocab_size, step):
        yield source.read_rows(name, start, min(config.vocab_size, start + step))


def head_step(config: ModelConfig) -> int:
    """How many rows of the head are in memory at once."""
    return min(HEAD_ROWS, rows_together(config.hidden_size))


def rows_together(width: int) -> int:
    """How many rows of a matrix of so many columns are worked on at once: all that is made of them is some of as many
    elements."""
    return max(1024, ROWS_ELEMENTS // width // 1024 * 1024)


class LayerTensors(dict[str, Array]):
    """A layer's tensors on a device, read at once. Those of its experts, which are most of it, are read each time that
    they are asked for, and not kept."""

    def __init__(self, source: Tensors, on: Device, wanted: Iterable[str]) -> None:
        super().__init__((name, on.from_host(source.read(name))) for name in wanted)
        self._source, self._on = source, on

    def __missing__(self, name: str) -> Array:
        return self._on.from_host(self._source.read(name))


class Layer:
    """One decoder layer with its weights on a device: whole, or step by step for who looks at what linears read. All
    that goes in and comes out is that device's too. Where `elsewhere` is set, it is asked for what experts make."""

    elsewhere: Elsewhere | None = None

    def __init__(
        self, config: ModelConfig, anatomy: DecoderLayer, tensors: dict[str, Array], on: Device = NUMPY
    ) -> None:
        self.config, self.anatomy, self.tensors, self.on = config, anatomy, tensors, on

    def __call__(self, x: Array, lengths: Sequence[int] = ()) -> Array:
        """[T, D] to [T, D], causal, from position 0; `lengths` are those of several sequences behind each other."""
        for half in self.anatomy.sublayers:
            x = self.through(half, x, lengths)
        return x

    def finish(self, x: Array, mixed: Array) -> Array:
        """[T, D] to [T, D] from where attention gave `mixed` [T, H * Dh]."""
        return self.through(self.anatomy.mlp, self.added(self.anatomy.attention, x, mixed))

    def through(self, half: Sublayer, x: Array, lengths: Sequence[int] = (), look: Look = unseen) -> Array:
        """The residual stream [T, D] with a sublayer's output added; `look` sees what each of its linears reads."""
        normed = self.normed(half, x)
        if isinstance(half, Moe):
            return x + self.experts(half, normed, look)
        inner = self.inner(half, look(half.normed_input, normed), lengths, look)
        return self.added(half, x, look(half.inner_input, inner))

    def normed(self, half: Sublayer, x: Array) -> Array:
        """[T, D], what the linears behind the norm of a sublayer read of the residual stream [T, D]."""
        return rms_norm(x, self.tensors[half.norm.weight], self.config.stream_eps)

    def reads(self, half: Sublayer, given: LinearInput, x: Array) -> Array:
        """What linears read, [T, width], of the residual stream [T, D], where no attention stands before them."""
        normed = self.normed(half, x)
        if isinstance(half, LatentAttention) and given in half.latent_inputs:
            return (
                self.kv_latent(half, normed)[0] if given.linears[0] == half.kv_b_proj else self.q_latent(half, normed)
            )
        if isinstance(half, Moe) and half.shared and given == half.shared.inner_input:
            return self.mlp_hidden(half.shared, normed)
        return normed

    def inner(self, half: Mixer | Mlp, normed: Array, lengths: Sequence[int] = (), look: Look = unseen) -> Array:
        """[T, D] to what the last linear of a sublayer reads: [T, H * Dh], or [T, intermediate_size]."""
        return self.mlp_hidden(half, normed) if isinstance(half, Mlp) else self.mixed(half, normed, lengths, look)

    def added(self, half: Mixer | Mlp, x: Array, inner: Array) -> Array:
        """The residual stream [T, D] with a sublayer's output added."""
        output, norm = self.linear(half.last, inner), half.output_norm
        return x + (self.rms_norm(norm, output) if norm else output)

    def mixed(self, attention: Mixer, normed: Array, lengths: Sequence[int] = (), look: Look = unseen) -> Array:
        """[T, D] to [T, H * Dh], causal, each sequence from position 0."""
        each = [np.arange(length) for length in lengths or (normed.shape[0],)]
        ends = np.cumsum([positions.size for positions in each])
        if isinstance(attention, LinearAttention):
            return self.on.concatenate(
                [
                    self.recurrent(attention, normed[end - positions.size : end], DeltaState.empty(attention.shape))
                    for positions, end in zip(each, ends, strict=True)
                ]
            )
        together = np.concatenate(each)
        if isinstance(attention, LatentAttention):
            parts = self._project_latent(attention, normed, together, look)
        else:
            parts = self.project(normed, together)
        pieces = (
            [part[end - positions.size : end] for positions, end in zip(each, ends, strict=True)] for part in parts
        )
        mixed = self.on.concatenate(
            [
                attend(q, k, v, positions, attention.window, self.config.attention_scale, self.sinks)
                for q, k, v, positions in zip(*pieces, each, strict=True)
            ]
        )
        return self.gated(normed, mixed)

    def gated(self, normed: Array, mixed: Array) -> Array:
        """What attention gives, [T, H * Dh], times the sigmoid of its gate where it has one."""
        gate = self.anatomy.attention.gate_proj if isinstance(self.anatomy.attention, Attention) else None
        return mixed / (1 + self.on.exp(-self.linear(gate, normed))) if gate else mixed

    def recurrent(self, attention: LinearAttention, normed: Array, state: DeltaState) -> Array:
        """[T, D] of one text's next tokens to [T, H * Dv] by the gated delta rule, which moves its state on.

        The rule goes from token to token, so it is the host's whatever the device.
        """
        host, tensors = self.on.to_host, self.tensors
        mixed, z, b, a = (host(self.linear(linear, normed)) for linear in attention.first)
        mixed = convolved(state, mixed, host(tensors[attention.conv1d]))
        # ln(1 + e^x), which neither overflows nor loses small e^x.
        steps = np.logaddexp(np.float32(0), a + host(tensors[attention.dt_bias]))
        decay: Array = np.exp(-np.exp(host(tensors[attention.A_log])) * steps)
        write = np.asarray(1 / (1 + np.exp(-b)), np.float32)
        made = delta_rule(attention.shape, state, mixed, decay, write)
        normed_heads = rms_norm(made, host(tensors[attention.gated_norm]), self.config.rms_norm_eps)
        return self.on.from_host(normed_heads.reshape(z.shape) * silu(z))

    def experts(self, moe: Moe, normed: Array, look: Look = unseen) -> Array:
        """[T, D] to [T, D]: the outputs of each token's experts, weighed and added up. Experts go by one after the
        other, each with the tokens that chose it, and one that none chose is left out."""
        logits = self.on.to_host(self.linear(moe.router, normed))
        if moe.routing.groups:
            weights = routed_by_groups(moe.routing, logits, self.on.to_host(self.tensors[moe.choice_bias]))
        else:
            weights = routed(moe.routing, logits)
        made = self.on.zeros(normed.shape)
        if shared := moe.shared:
            hidden = self.mlp_hidden(shared, look(shared.normed_input, normed))
            made += self.linear(shared.down_proj, look(shared.inner_input, hidden))
        chosen = chosen_experts(weights)
        outputs = self.elsewhere(normed, chosen) if self.elsewhere else self._one_by_one(moe, normed, chosen, look)
        for one, output in zip(chosen, outputs, strict=True):
            made[self.on.index(one.tokens)] += output * self.on.from_host(weights[one.tokens, one.expert, None])
        return made

    def _one_by_one(self, moe: Moe, normed: Array, chosen: Sequence[Chosen], look: Look) -> Iterator[Array]:
        return (self.expert(moe, one.expert, normed[self.on.index(one.tokens)], look) for one in chosen)

    def expert(self, moe: Moe, k: int, normed: Array, look: Look = unseen) -> Array:
        """An expert's output [T, D] of the tokens [T, D] that chose it."""
        expert = moe.experts[k]
        hidden = self.expert_hidden(moe.routing, expert, look(expert.normed_input, normed))
        return self.linear(expert.down_proj, look(expert.inner_input, hidden))

    def expert_hidden(self, routing: Experts, expert: Expert, normed: Array) -> Array:
        """An expert's activations [T, intermediate_size] of its normed input [T, D]."""
        if routing.limit is None:
            return self.mlp_hidden(expert, normed)
        gate, up = self.linear(expert.gate_proj, normed), self.linear(expert.up_proj, normed)
        gate, up = self.on.clip(gate, -np.inf, routing.limit), self.on.clip(up, -routing.limit, routing.limit)
        hidden: Array = gate / (1 + self.on.exp(-routing.alpha * gate)) * (up + routing.offset)
        return hidden

    @property
    def sinks(self) -> Array | None:
        """The logits [H] that stand for no token in the softmax of attention, None in most families."""
        name = self.anatomy.attention.sinks
        return self.tensors[name] if name else None

    def mlp_hidden(self, mlp: Mlp | Expert, normed: Array) -> Array:
        """The MLP's activations [T, intermediate_size] of its normed input [T, D]."""
        gate, up = self.linear(mlp.gate_proj, normed), self.linear(mlp.up_proj, normed)
        return self.on.by_rows(lambda some, others: self.activated(mlp, some) * others, gate, up)

    def activated(self, mlp: Mlp | Expert, gate: Array) -> Array:
        """The gate through SiLU, or GELU by its tanh, each element for itself."""
        if isinstance(mlp, Mlp) and mlp.activation == GELU_TANH:
            cube: Array = gate * gate * gate
            # Beyond 80 a sigmoid is 0 or 1 in float32, and its exponential would be infinite.
            inside: Array = self.on.clip(_GELU * gate + 0.044715 * _GELU * cube, -80, 80)
            gelu: Array = gate / (1 + self.on.exp(-inside))
            return gelu
        silu: Array = gate / (1 + self.on.exp(-gate))
        return silu

    def project(self, normed: Array, positions: NDArray[np.int64]) -> tuple[Array, Array, Array]:
        """q [T, H, Dh], k and v [T, K, Dh] of tokens at `positions`, rotated where the layer has RoPE."""
        c, attention, T = self.config, self.anatomy.attention, normed.shape[0]
        if isinstance(attention, LatentAttention):
            return self._project_latent(attention, normed, positions)
        assert isinstance(attention, Attention)
        q, k, v = (self.linear(linear, normed).reshape(T, -1, c.head_dim) for linear in attention.qkv)
        if attention.q_norm:
            q = self.rms_norm(attention.q_norm, q)
        if attention.k_norm:
            k = self.rms_norm(attention.k_norm, k)
        if not attention.rope:
            return q, k, v
        cos, sin = rotation(c.rope_of(attention.window), c.rotary_head_dim, positions)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _project_latent(
        self, attention: LatentAttention, normed: Array, positions: NDArray[np.int64], look: Look = unseen
    ) -> tuple[Array, Array, Array]:
        """q and k [T, H, qk_head_dim], v [T, H, v_head_dim], rotated channels last; pairs that turn are neighbours."""
        shape, T, H = attention.shape, normed.shape[0], self.config.num_attention_heads
        nope, rope = shape.qk_nope_head_dim, shape.qk_rope_head_dim
        latent, (kv_latent, k_rope) = self.q_latent(attention, normed), self.kv_latent(attention, normed)
        if attention.q_input:
            latent = look(attention.q_input, latent)
        q = self.linear(attention.q_proj, latent).reshape(T, H, nope + rope)
        kv = self.linear(attention.kv_b_proj, look(attention.kv_input, kv_latent)).reshape(
            T, H, nope + shape.v_head_dim
        )
        cos, sin = rotation(self.config.rope, rope, positions)
        turned = rotate_neighbours(k_rope[:, None], cos, sin) + self.on.zeros((T, H, rope))
        k = self.on.concatenate([kv[..., :nope], turned], axis=-1)
        q = self.on.concatenate([q[..., :nope], rotate_neighbours(q[..., nope:], cos, sin)], axis=-1)
        return q, k, self.on.contiguous(kv[..., nope:])

    def q_latent(self, attention: LatentAttention, normed: Array) -> Array:
        """What queries are made of: a latent [T, q_lora_rank] of the norm's output [T, D], or that itself."""
        if not attention.q_a_proj or not attention.q_a_layernorm:
            return normed
        return self.rms_norm(attention.q_a_layernorm, self.linear(attention.q_a_proj, normed))

    def kv_latent(self, attention: LatentAttention, normed: Array) -> tuple[Array, Array]:
        """What keys and values are made of: the latent [T, kv_lora_rank], and the keys' channels that are rotated."""
        both, rank = self.linear(attention.kv_a_proj, normed), attention.shape.kv_lora_rank
        return self.rms_norm(attention.kv_a_layernorm, both[:, :rank]), both[:, rank:]

    def rms_norm(self, norm: Norm, x: Array) -> Array:
        """[..., width] to [..., width] with a norm's gains."""
        return rms_norm(x, self.tensors[norm.weight], norm.eps or self.config.rms_norm_eps)

    def linear(self, linear: Linear, x: Array) -> Array:
        """The linear's output [T, out_features] of its input [T, in_features]."""
        y = self.product(linear, x)
        return y + self.tensors[names.bias(linear.module)] if linear.has_bias else y

    def product(self, linear: Linear, x: Array) -> Array:
        """A linear's output [T, out_features] before its bias."""
        return self.on.product(x, self.tensors[linear.weight].T)


def read_layer(config: ModelConfig, source: Tensors, layer_index: int, on: Device = NUMPY) -> Layer:
    """Reads one layer's tensors onto a device, in the order of their file; those of experts when they are used."""
    anatomy = decoder_of(config).layers[layer_index]
    wanted = [name for name in source.names() if name.startswith(anatomy.prefix) and not names.is_expert(name)]
    tensors: dict[str, Array] = LayerTensors(source, on, wanted)
    # Without experts it holds all there is to it, and may go to another process.
    return Layer(config, anatomy, tensors if isinstance(anatomy.mlp, Moe) else dict(tensors), on)


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """x over the root of its mean square along the last axis, times the gain."""
    on = device_of(x)

    def normed(some: Array) -> Array:
        made: Array = some / on.sqrt((some * some).mean(axis=-1, keepdims=True) + eps) * gain
        return made

    return on.by_rows(normed, x)
