"""What a model family is: how its config.json is read, and what the decoder it describes is made of.

Each file of `families/` is one `Family`; nothing outside that folder compares a model_type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from toolkit.checkpoint.fields import Fields

# What config.json calls the layers of attention over all of the text, and over a window of it.
LAYER_KINDS: Final = ("full_attention", "sliding_attention")
# What gate goes through before it is multiplied with up, by config.json's names.
SILU: Final = "silu"
GELU_TANH: Final = "gelu_pytorch_tanh"
# onnxruntime-genai's type for a decoder that it has no name of its own for.
DECODER: Final = "decoder"


@dataclass(frozen=True)
class Experts:
    """How the MLP of a layer is made of `count` small ones, its experts, of which each token goes through `per_token`.

    A router gives each expert a logit; their softmax over all experts weighs the outputs of the chosen ones, or, where
    `normalized`, the softmax over the chosen ones alone. `intermediate_size` is an expert's width. `dense_layers` are
    the indices of layers with an ordinary MLP.

    What an expert makes of gate and up is gate * sigmoid(`alpha` * gate) * (up + `offset`); a `limit` bounds both
    before, the gate from above alone. Where `biased` the router and every linear of an expert add a bias. `router` is
    the module's name, and `stacked` says that a checkpoint has the experts of a layer in one tensor, input features
    first, columns of gate and up by turns. Every token goes through an MLP of `shared_intermediate_size` besides, if
    that is not 0, and `scaling` multiplies what the chosen experts give.

    `groups` is (n_group, topk_group) where affinities are sigmoids: the experts are in so many groups, of which those
    whose two highest affinities, a learned bias added, have the largest sums are open. The bias decides who is chosen
    and weighs nothing (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    """

    count: int
    per_token: int
    intermediate_size: int
    normalized: bool
    dense_layers: tuple[int, ...] = ()
    alpha: float = 1.0
    offset: float = 0.0
    limit: float | None = None
    biased: bool = False
    router: str = "gate"
    stacked: bool = False
    shared_intermediate_size: int = 0
    scaling: float = 1.0
    groups: tuple[int, int] | None = None


@dataclass(frozen=True)
class Latent:
    """Attention through a latent of `kv_lora_rank` channels, from which keys and values of each head are made
    (DeepSeek-V2, arXiv 2405.04434, section 2.1). Of a head's query and key `qk_nope_head_dim` channels know no position
    and `qk_rope_head_dim` are rotated, those of the key for all heads alike. Queries have a latent of their own, of
    `q_lora_rank` channels, unless that is None."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None

    @property
    def qk_head_dim(self) -> int:
        """How wide a head's query and key are."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class DeltaNet:
    """Linear attention by the gated delta rule (arXiv 2412.06464) in place of softmax attention, in some `layers` by
    their indices. A state of `linear_key_head_dim` x `linear_value_head_dim` for each head of values stands for all of
    the text so far; each head of keys serves as many heads of values, one behind the other. A convolution over
    `linear_conv_kernel_dim` tokens comes before it. The other names are those of config.json too."""

    layers: tuple[int, ...]
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int

    @property
    def key_size(self) -> int:
        """How wide the keys of all heads are together, and the queries."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_size(self) -> int:
        """How wide the values of all heads are together."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_size(self) -> int:
        """How many channels go through the convolution: queries, keys and values, in this order."""
        return 2 * self.key_size + self.value_size

    @property
    def conv_state(self) -> tuple[int, int]:
        """The shape of what the convolution has to remember: its channels of the tokens before."""
        return self.conv_size, self.linear_conv_kernel_dim - 1

    @property
    def recurrent_state(self) -> tuple[int, int, int]:
        """The shape of what stands for the text so far."""
        return self.linear_num_value_heads, self.linear_key_head_dim, self.linear_value_head_dim


@dataclass(frozen=True)
class Structure:
    """What a decoder has beside the seven linears and two norms of every layer, each with Llama's answer as default.

    `qkv_bias`, `o_bias` and `mlp_bias` say which linears add a bias, `qk_norm` whether an RMSNorm over each head of q
    and k comes before RoPE. `sliding_windows` has a layer's window in tokens, itself included, or None for all of the
    text, and is empty where no layer slides. `layers_without_rope` are indices. `experts` is None where every MLP is
    one. `sinks` are logits, one a head, that take part in the softmax over keys and stand for no token. `merged` says
    that a checkpoint has q, k and v of a layer in one tensor, and gate and up in another.

    `activation` is what gate goes through, by its name in config.json. `output_norms` says that a norm stands behind
    each sublayer too, `gains_from_one` that a norm's gains are 1 and the weight of a checkpoint together. The embedding
    is multiplied by `embedding_scale`. `query_pre_attn_scalar` stands for head_dim in attention's scale, None where
    they are the same. `local_rope_theta` is RoPE's base in layers that slide, None where it is the others'.

    `delta_net` is what layers of linear attention have, None where there are none. Where `output_gate` softmax
    attention's output is multiplied by the sigmoid of a gate that a linear makes, whose rows a checkpoint has in
    q_proj: behind those of each head's query.

    `num_nextn_predict_layers` is how many layers behind the last a checkpoint may have that predict further tokens
    (DeepSeek-V3, arXiv 2412.19437, section 2.2). `mtp_layer` is None but for a decoder that is one of them, of which it
    is the index there (mtp.py).
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    layers_without_rope: tuple[int, ...] = ()
    experts: Experts | None = None
    sinks: bool = False
    latent: Latent | None = None
    delta_net: DeltaNet | None = None
    output_gate: bool = False
    merged: bool = False
    activation: str = SILU
    output_norms: bool = False
    gains_from_one: bool = False
    embedding_scale: float = 1.0
    query_pre_attn_scalar: float | None = None
    local_rope_theta: float | None = None
    num_nextn_predict_layers: int = 0
    mtp_layer: int | None = None


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp's files write a family: the `general.architecture`, and whether rows of q_proj and k_proj stand so
    that RoPE turns `neighbours` (2i, 2i + 1) (llama_model_rope_type in llama.cpp's llama-model.cpp)."""

    architecture: str
    neighbours: bool = False


@dataclass(frozen=True)
class Family:
    """One `model_type` of config.json, and what it means.

    `structure` gets the config's fields and its num_hidden_layers; it raises CheckpointError for fields that
    contradict each other. `genai_type` is `model.type` of genai_config.json. `defaults` are keys a config.json may
    leave out, with the value that transformers' configuration class then takes, `default_positions` that of
    max_position_embeddings. `gguf` is None where no GGUF file is
    read as this family. `partial_rotary` is whether RoPE may turn a part of each head alone. `activation_key` says
    where config.json names what gate goes through. A model of several kinds of input has its decoder's config under
    `text_config`, and the decoder's tensors under `text_model`.
    """

    model_type: str
    structure: Callable[[Fields, int], Structure]
    genai_type: str = DECODER
    defaults: Mapping[str, Any] = field(default_factory=dict)
    gguf: Gguf | None = None
    default_positions: int = 32768
    partial_rotary: bool = False
    activation_key: str = "hidden_act"
    text_config: str = ""
    text_model: tuple[str, ...] = ()


def sliding_windows(
    read: Fields, layers: int, sliding: Sequence[bool] | None = None, *, listed: bool = True
) -> tuple[int | None, ...]:
    """Returns each layer's window, or an empty tuple unless `use_sliding_window` is set and `sliding_window` is given.

    `layer_types` decides which layers slide. A config without it has those where `sliding` is true, or, if that is
    None, the layers from `max_window_layers` on. A family that knows no `layer_types` says so with `listed`. Raises
    CheckpointError for a key of the wrong kind.
    """
    if read.get("sliding_window") is None or not read.flag("use_sliding_window", default=False):
        return ()
    window = read.count("sliding_window")
    kinds = read.each_layer("layer_types", layers, LAYER_KINDS) if listed else None
    if kinds is not None:
        sliding = [kind == "sliding_attention" for kind in kinds]
    elif sliding is None:
        first = read.count("max_window_layers", least=0)
        sliding = [index >= first for index in range(layers)]
    return tuple(window if slides else None for slides in sliding)
