"""What the two halves of a decoder's layer are made of.

A half reads the residual stream through a norm and adds to it. `anatomy.py` gives them their names and sizes.
D hidden, H heads, K kv heads, Dh head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.checkpoint.family import SILU, DeltaNet, Experts, Latent
from toolkit.checkpoint.linears import Linear, LinearInput, Norm


@dataclass(frozen=True)
class Attention:
    """The first sublayer. `q_norm` and `k_norm` go over each head before RoPE, in families that have them.

    `window` is how many tokens a query sees, itself included, None for all; `rope` is whether queries and keys are
    rotated by their position. `qkv_proj` and `kv_proj` are the modules that q, k and v, or k and v alone, become where
    a graph stacks their rows. `sinks` is the tensor of a logit for each head that stands for no token, None in most
    families. `output_norm` goes over what is added to the residual stream, in families that have one. Its output is
    multiplied by the sigmoid of what `gate_proj` makes, in families that have one.
    """

    norm: Norm
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    qkv_proj: str
    kv_proj: str
    normed_input: LinearInput
    inner_input: LinearInput
    window: int | None
    rope: bool
    sinks: str | None = None
    output_norm: Norm | None = None
    gate_proj: Linear | None = None

    @property
    def qkv(self) -> tuple[Linear, Linear, Linear]:
        """The linears whose rows are heads; the columns of `o_proj` are."""
        return self.q_proj, self.k_proj, self.v_proj

    @property
    def inputs(self) -> tuple[LinearInput, ...]:
        """What its linears read, in the order in which it is computed."""
        return self.normed_input, self.inner_input

    @property
    def first(self) -> tuple[Linear, ...]:
        """The linears that read the norm's output."""
        return self.normed_input.linears

    @property
    def last(self) -> Linear:
        """The linear whose output is added to the residual stream."""
        return self.o_proj

    @property
    def writers(self) -> tuple[Linear, ...]:
        """The linears that write into the residual stream."""
        return (self.last,)

    @property
    def exact_linears(self) -> tuple[Linear, ...]:
        """The linears that are never quantized: none."""
        return ()

    @property
    def head_norms(self) -> tuple[Norm, ...]:
        """The norms over heads, none in most families."""
        return tuple(norm for norm in (self.q_norm, self.k_norm) if norm)


@dataclass(frozen=True)
class LatentAttention:
    """The first sublayer where keys and values are made of a latent (DeepSeek-V2).

    `q_proj` makes the heads of queries, of the norm's output or of a latent that `q_a_proj` and `q_a_layernorm` make.
    `kv_a_proj` makes the latent and the channels of the keys that are rotated, `kv_b_proj` every head's other channels
    of the key and its value.
    """

    norm: Norm
    q_a_proj: Linear | None
    q_a_layernorm: Norm | None
    q_proj: Linear
    kv_a_proj: Linear
    kv_a_layernorm: Norm
    kv_b_proj: Linear
    o_proj: Linear
    shape: Latent
    window: int | None = None
    sinks: str | None = None
    output_norm: Norm | None = None

    @property
    def first(self) -> tuple[Linear, ...]:
        """The linears that read the norm's output."""
        return self.q_a_proj or self.q_proj, self.kv_a_proj

    @property
    def last(self) -> Linear:
        """The linear whose output is added to the residual stream."""
        return self.o_proj

    @property
    def normed_input(self) -> LinearInput:
        """Returns the norm's output, which `first` reads."""
        return LinearInput(self.first, self.norm, self.norm.width)

    @property
    def q_input(self) -> LinearInput | None:
        """Returns the latent that queries are made of, None where they have none."""
        return LinearInput((self.q_proj,), self.q_a_layernorm, self.q_proj.in_features) if self.q_a_layernorm else None

    @property
    def kv_input(self) -> LinearInput:
        """Returns the latent that keys and values are made of."""
        return LinearInput((self.kv_b_proj,), self.kv_a_layernorm, self.kv_b_proj.in_features)

    @property
    def inner_input(self) -> LinearInput:
        """Returns what `last` reads. Rows of kv_b_proj that make it stand between others, so none are folded."""
        return LinearInput((self.o_proj,), None, self.o_proj.in_features)

    @property
    def latent_inputs(self) -> tuple[LinearInput, ...]:
        """Returns the latents that heads are made of."""
        return (self.q_input, self.kv_input) if self.q_input else (self.kv_input,)

    @property
    def inputs(self) -> tuple[LinearInput, ...]:
        """What its linears read, in the order in which it is computed."""
        return self.normed_input, *self.latent_inputs, self.inner_input

    @property
    def writers(self) -> tuple[Linear, ...]:
        """The linears that write into the residual stream."""
        return (self.o_proj,)

    @property
    def exact_linears(self) -> tuple[Linear, ...]:
        """The linears that are never quantized: none."""
        return ()

    @property
    def head_norms(self) -> tuple[Norm, ...]:
        """The norms inside, those over latents."""
        return tuple(norm for norm in (self.q_a_layernorm, self.kv_a_layernorm) if norm)


@dataclass(frozen=True)
class LinearAttention:
    """The first sublayer where a state stands for the text, by the gated delta rule (Gated DeltaNet).

    `in_proj_qkv` makes queries, keys and values, which the convolution `conv1d` mixes with those of tokens before;
    `in_proj_b` how much of a value is written, and `in_proj_a`, with `dt_bias` and `A_log`, how much of the state is
    left. Each head's output goes through an RMSNorm, `gated_norm` its gains, which do not count from 1 where others do,
    and is multiplied by SiLU of what `in_proj_z` makes.
    """

    norm: Norm
    in_proj_qkv: Linear
    in_proj_z: Linear
    in_proj_b: Linear
    in_proj_a: Linear
    out_proj: Linear
    conv1d: str
    dt_bias: str
    A_log: str
    gated_norm: str
    shape: DeltaNet
    window: int | None = None
    sinks: str | None = None
    output_norm: Norm | None = None

    @property
    def vectors(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor that is neither a linear's nor a norm over the stream's, by name."""
        heads, shape = self.shape.linear_num_value_heads, self.shape
        return {
            self.conv1d: (shape.conv_size, 1, shape.linear_conv_kernel_dim),
            self.dt_bias: (heads,),
            self.A_log: (heads,),
            self.gated_norm: (shape.linear_value_head_dim,),
        }

    @property
    def first(self) -> tuple[Linear, ...]:
        """The linears that read the norm's output."""
        return self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a

    @property
    def last(self) -> Linear:
        """The linear whose output is added to the residual stream."""
        return self.out_proj

    @property
    def normed_input(self) -> LinearInput:
        """Returns the norm's output. It is read by linears too that are never quantized, so nothing is folded."""
        return LinearInput((self.in_proj_qkv, self.in_proj_z), None, self.norm.width)

    @property
    def inner_input(self) -> LinearInput:
        """Returns what `last` reads, a product of two, so that nothing is folded."""
        return LinearInput((self.out_proj,), None, self.out_proj.in_features)

    @property
    def inputs(self) -> tuple[LinearInput, ...]:
        """What its linears read, in the order in which it is computed."""
        return self.normed_input, self.inner_input

    @property
    def writers(self) -> tuple[Linear, ...]:
        """The linears that write into the residual stream."""
        return (self.out_proj,)

    @property
    def exact_linears(self) -> tuple[Linear, ...]:
        """The linears that are never quantized: those of a number a head, whose error every later token would have."""
        return self.in_proj_b, self.in_proj_a

    @property
    def head_norms(self) -> tuple[Norm, ...]:
        """The norms inside that are as those over the stream: none."""
        return ()


@dataclass(frozen=True)
class Mlp:
    """The second sublayer: down_proj(activation(gate_proj(x)) * up_proj(x)); `act_fn` is the name of the activation's
    output. `output_norm` goes over what is added to the residual stream, in families that have one."""

    norm: Norm
    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    act_fn: str
    normed_input: LinearInput
    inner_input: LinearInput
    activation: str = SILU
    output_norm: Norm | None = None

    @property
    def linears(self) -> tuple[Linear, Linear, Linear]:
        """Every linear, in the order of the checkpoint."""
        return self.gate_proj, self.up_proj, self.down_proj

    @property
    def inputs(self) -> tuple[LinearInput, ...]:
        """What its linears read, in the order in which it is computed."""
        return self.normed_input, self.inner_input

    @property
    def first(self) -> tuple[Linear, ...]:
        """The linears that read the norm's output."""
        return self.gate_proj, self.up_proj

    @property
    def last(self) -> Linear:
        """The linear whose output is added to the residual stream."""
        return self.down_proj

    @property
    def writers(self) -> tuple[Linear, ...]:
        """The linears that write into the residual stream."""
        return (self.last,)

    @property
    def exact_linears(self) -> tuple[Linear, ...]:
        """The linears that are never quantized: none."""
        return ()


@dataclass(frozen=True)
class Expert:
    """One of the small MLPs that a router chooses from: down_proj(silu(gate_proj(x)) * up_proj(x))."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    normed_input: LinearInput
    inner_input: LinearInput


@dataclass(frozen=True)
class Moe:
    """The second sublayer where experts take the MLP's place: the sum of those that the router chose, each weighed.

    `gate_up_proj` and `down_proj` are the modules that the experts' matrices become where a graph stacks them: the rows
    of an expert's gate_proj and up_proj by turns, one expert behind the other.
    """

    norm: Norm
    router: Linear
    experts: tuple[Expert, ...]
    routing: Experts
    gate_up_proj: str
    down_proj: str
    shared: Mlp | None = None

    def stacks(self) -> dict[str, list[tuple[Linear, ...]]]:
        """The linears that become one, by its module: those of each expert, whose rows stand by turns."""
        gates = [(expert.gate_proj, expert.up_proj) for expert in self.experts]
        return {self.gate_up_proj: list(gates), self.down_proj: [(expert.down_proj,) for expert in self.experts]}

    @property
    def inputs(self) -> tuple[LinearInput, ...]:
        """What its experts' linears read, expert by expert. What the router reads is not rounded."""
        shared = self.shared.inputs if self.shared else ()
        routed = (given for expert in self.experts for given in (expert.normed_input, expert.inner_input))
        return (*shared, *routed)

    @property
    def first(self) -> tuple[Linear, ...]:
        """The linears that read the norm's output."""
        shared = self.shared.first if self.shared else ()
        return (self.router, *shared, *(linear for e in self.experts for linear in (e.gate_proj, e.up_proj)))

    @property
    def writers(self) -> tuple[Linear, ...]:
        """The linears that write into the residual stream."""
        return (*(self.shared.writers if self.shared else ()), *(expert.down_proj for expert in self.experts))

    @property
    def choice_bias(self) -> str:
        """The tensor that is added to affinities while experts are chosen, where they are chosen by groups."""
        return f"{self.router.module}.e_score_correction_bias"

    @property
    def exact_linears(self) -> tuple[Linear, ...]:
        """The linears that are never quantized: the router, whose error would send tokens elsewhere."""
        return (self.router,)


# The first half of a layer, where tokens meet.
Mixer = Attention | LatentAttention | LinearAttention
Sublayer = Mixer | Mlp | Moe
