"""`config.json` as Hugging Face writes it, resolved into facts no later floor has to guess.

Reads the form of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and of transformers 5
(`rope_parameters`, `dtype`). Fields carry the names of the file; `structure` is what the family (`families/`) makes of
the rest, and `anatomy.py` describes the decoder that all of it means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from toolkit.checkpoint.families import FAMILIES
from toolkit.checkpoint.family import Structure
from toolkit.checkpoint.fields import Fields
from toolkit.checkpoint.other_formats import missing_config
from toolkit.checkpoint.quantized_config import quantization_of
from toolkit.checkpoint.rope_config import RopeConfig, parse_rope, rotary_head_dim_of
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.files import is_there, read_json
from toolkit.names import CONFIG_FILE

# The deepest published decoders have some 130; what is planned for each layer has to fit into memory.
MOST_LAYERS: Final = 1000
# The ends of architectures that judge texts instead of writing them, some from the same weights but for their head.
_NO_WRITERS: Final = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForRewardModel",
    "ForProcessRewardModel",
    "ForMaskedLM",
)
# What a config.json with a decoder's config inside says for the decoder too.
_OF_THE_WHOLE: Final = (
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",
    "tie_word_embeddings",
)
_MAX_CONFIG_BYTES: Final = 4 << 20


@dataclass(frozen=True)
class ModelConfig:
    """One decoder's shape, and its structure, which its family decides.

    `head_dim` is the width heads are stored with, `rotary_head_dim` that which RoPE turns. They differ where heads were
    padded for an operator (padded_heads.py), where RoPE leaves a part of a head as it is (partial_rotary.py), and under
    latent attention. Products of queries and keys are multiplied by `attention_scale`.

    Of a decoder that is `traced` transformers alone knows the layers (any_decoder.py): its structure, RoPE, epsilon and
    attention's scale say nothing here.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_head_dim: int
    attention_scale: float
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    structure: Structure
    rope: RopeConfig
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    traced: bool = False

    def rope_of(self, window: int | None) -> RopeConfig:
        """Returns the RoPE of layers with this window: of those that slide another where the family has one."""
        theta = self.structure.local_rope_theta
        return self.rope if window is None or theta is None else RopeConfig(rope_theta=theta)

    @property
    def stream_eps(self) -> float:
        """The epsilon of norms that read the residual stream, which is in units of `embedding_scale` (gains.py)."""
        return self.rms_norm_eps / self.structure.embedding_scale**2

    @property
    def longest_context(self) -> int:
        """How many tokens the model reads: under YaRN `factor` times the original length (arXiv 2309.00071), whatever
        max_position_embeddings says, which Qwen's files leave as it was."""
        if self.rope.rope_type != "yarn":
            return self.max_position_embeddings
        return max(self.max_position_embeddings, int(self.rope.factor * self.rope.original_max_position_embeddings))

    @property
    def v_head_dim(self) -> int:
        """How wide a head's value is: as its key, but under latent attention."""
        return self.structure.latent.v_head_dim if self.structure.latent else self.head_dim

    @property
    def q_size(self) -> int:
        """Output features of q_proj: `num_attention_heads * head_dim`, which need not be `hidden_size`."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Output features of k_proj and v_proj."""
        return self.num_key_value_heads * self.head_dim


def read_config(folder: Path) -> ModelConfig:
    """The config of the checkpoint in `folder`.

    Raises CheckpointError if the file is missing, too large, not JSON or inconsistent, and UnsupportedError for a
    family or RoPE type outside `FAMILIES` and `ROPE_TYPES`.
    """
    path = folder / CONFIG_FILE
    if folder.is_dir() and not is_there(path, CheckpointError):
        raise missing_config(folder)
    return parse_config(read_checkpoint_json(path, _MAX_CONFIG_BYTES), path)


def read_checkpoint_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """A JSON object from a checkpoint's file of bounded size; raises CheckpointError with the file's name otherwise."""
    return read_json(path, max_bytes, CheckpointError, "a checkpoint folder in Hugging Face layout has one")


def check_kind(raw: Mapping[str, Any], path: Path) -> None:
    """Raises UnsupportedError for a model that judges texts and writes none."""
    listed = raw.get("architectures")
    for kind in listed if isinstance(listed, list) else ():
        if isinstance(kind, str) and kind.endswith(_NO_WRITERS):
            raise UnsupportedError(
                f"{path}: architectures is {kind[:60]!r}, a model that writes no text: expected one …ForCausalLM"
            )


def parse_config(raw: Mapping[str, Any], path: Path) -> ModelConfig:
    """`raw` resolved; `path` appears in messages only. Raises as `read_config` does."""
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise UnsupportedError(
            f"{path}: model_type {raw.get('model_type')!r:.60} is not supported, expected one of {', '.join(FAMILIES)}"
        )
    if family.text_config:
        raw = _text_config(raw, family.text_config, path)
    read = Fields(raw, path, family.defaults)
    check_kind(raw, path)
    quantization_of(raw, path)  # refuses what is not read
    heads = read.count("num_attention_heads")
    hidden = read.count("hidden_size")
    head_dim = read.count("head_dim", hidden // heads)
    kv_heads = read.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"{path}: {heads} attention heads cannot share {kv_heads} key/value heads evenly")
    if head_dim % 2:
        raise CheckpointError(f"{path}: head_dim {head_dim} is odd, rotary embeddings need an even one")
    rotary_head_dim = rotary_head_dim_of(read, head_dim, family.partial_rotary)
    layers = read.count("num_hidden_layers", most=MOST_LAYERS)
    positions = read.count("max_position_embeddings", family.default_positions)
    structure = family.structure(read, layers)
    if read.get(family.activation_key) not in (None, structure.activation):
        raise UnsupportedError(
            f"{path}: {family.activation_key} {read.get(family.activation_key)!r:.60} is not supported, expected "
            f"{structure.activation!r}"
        )
    rope = parse_rope(read, positions, rotary_head_dim, "full_attention" if structure.local_rope_theta else "")
    if structure.latent:
        head_dim, rotary_head_dim, kv_heads = structure.latent.qk_head_dim, structure.latent.qk_rope_head_dim, heads
    return ModelConfig(
        model_type=family.model_type,
        hidden_size=hidden,
        intermediate_size=read.count("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rotary_head_dim=rotary_head_dim,
        attention_scale=_attention_scale(structure, rope, head_dim),
        vocab_size=read.count("vocab_size"),
        max_position_embeddings=positions,
        rms_norm_eps=read.positive("rms_norm_eps", 1e-6),
        tie_word_embeddings=read.flag("tie_word_embeddings", default=False),
        structure=structure,
        rope=rope,
        bos_token_id=read.token_id("bos_token_id", read.count("vocab_size")),
        eos_token_ids=read.token_ids("eos_token_id"),
        pad_token_id=read.token_id("pad_token_id", read.count("vocab_size")),
    )


def _text_config(raw: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    """The decoder's config of a model of several kinds of input, with what stands beside it for the whole."""
    inner = raw.get(key)
    if not isinstance(inner, dict):
        raise CheckpointError(f"{path}: {key} is {inner!r:.60}, expected an object")
    beside = {name: value for name, value in raw.items() if name in _OF_THE_WHOLE}
    return beside | {name: value for name, value in inner.items() if value is not None}


def _attention_scale(structure: Structure, rope: RopeConfig, head_dim: int) -> float:
    """What products of queries and keys are multiplied by. Under latent attention YaRN sharpens them here, by the
    square of its `mscale_all_dim`'s magnitude."""
    magnitude = 1.0
    if structure.latent and rope.rope_type == "yarn" and rope.mscale_all_dim and rope.factor > 1:
        magnitude = 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0
    return float((structure.query_pre_attn_scalar or head_dim) ** -0.5 * magnitude**2)
