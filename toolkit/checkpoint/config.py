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
from toolkit.checkpoint.family import LAYER_KINDS, Structure
from toolkit.checkpoint.fields import Fields, positive, whole
from toolkit.checkpoint.other_formats import missing_config
from toolkit.checkpoint.quantized_config import quantization_of
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.files import is_there, read_json
from toolkit.names import CONFIG_FILE

ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn", "longrope")
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
_MAX_CONFIG_BYTES: Final = 4 << 20


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding parameters; fields other than `rope_type` and `rope_theta` hold for the types that read them.

    `original_max_position_embeddings`, `low_freq_factor` and `high_freq_factor` belong to llama3; `attention_factor`,
    `beta_fast`, `beta_slow`, `mscale`, `mscale_all_dim`, `truncate` to yarn (arXiv 2309.00071). Of longrope
    (arXiv 2402.13753) `short_factor` divides the inverse frequency of each pair in texts of up to
    `original_max_position_embeddings` tokens, and `long_factor`, from its first token on, in one that is longer.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def switch(self, context_length: int) -> int | None:
        """Returns the longest text, in tokens, that is not turned by the long factors, None where every text of a
        context is turned alike."""
        original = self.original_max_position_embeddings
        return original if self.rope_type == "longrope" and context_length > original else None


@dataclass(frozen=True)
class ModelConfig:
    """One decoder's shape, and its structure, which its family decides.

    `head_dim` is the width heads are stored with, `rotary_head_dim` that which RoPE turns. They differ where heads were
    padded for an operator (padded_heads.py), where RoPE leaves a part of a head as it is (partial_rotary.py), and under
    latent attention. Products of queries and keys are multiplied by `attention_scale`.
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


def _check_kind(raw: Mapping[str, Any], path: Path) -> None:
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
    read = Fields(raw, path, family.defaults)
    _check_kind(raw, path)
    if raw.get("hidden_act") not in (None, "silu"):
        raise UnsupportedError(f"{path}: hidden_act {raw['hidden_act']!r:.60} is not supported, expected 'silu'")
    quantization_of(raw, path)  # refuses what is not read
    heads = read.count("num_attention_heads")
    hidden = read.count("hidden_size")
    head_dim = read.count("head_dim", hidden // heads)
    kv_heads = read.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"{path}: {heads} attention heads cannot share {kv_heads} key/value heads evenly")
    if head_dim % 2:
        raise CheckpointError(f"{path}: head_dim {head_dim} is odd, rotary embeddings need an even one")
    rotary_head_dim = _rotary_head_dim(read, head_dim, family.partial_rotary)
    layers = read.count("num_hidden_layers", most=MOST_LAYERS)
    positions = read.count("max_position_embeddings", family.default_positions)
    structure, rope = family.structure(read, layers), _parse_rope(read, positions, rotary_head_dim)
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


def _first_of(values: Mapping[str, Any], *keys: str) -> Any:
    """The first of the values that is there and not null."""
    return next((values[key] for key in keys if values.get(key) is not None), None)


def _rope_parameters(read: Fields) -> dict[str, Any]:
    """The one set of RoPE's parameters; those that transformers 5 writes for each kind of layer must be alike."""
    given = read.get("rope_parameters") or read.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"{read.path}: rope parameters are {given!r:.60}, expected an object")
    by_kind = [given[kind] for kind in LAYER_KINDS if kind in given]
    if not by_kind:
        return given
    if not all(isinstance(one, dict) and one == by_kind[0] for one in by_kind):
        raise UnsupportedError(f"{read.path}: RoPE differs between kinds of layers, which is not supported")
    return dict(by_kind[0])


def _attention_scale(structure: Structure, rope: RopeConfig, head_dim: int) -> float:
    """What products of queries and keys are multiplied by. Under latent attention YaRN sharpens them here, by the
    square of its `mscale_all_dim`'s magnitude."""
    magnitude = 1.0
    if structure.latent and rope.rope_type == "yarn" and rope.mscale_all_dim and rope.factor > 1:
        magnitude = 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0
    return float(head_dim**-0.5 * magnitude**2)


def _rotary_head_dim(read: Fields, head_dim: int, partial: bool) -> int:
    """How many channels of a head RoPE turns: all of them, or, in families where that may be, the first part."""
    share = _rope_parameters(read).get("partial_rotary_factor", read.get("partial_rotary_factor"))
    if share in (None, 1, 1.0):
        return head_dim
    if not partial:
        raise UnsupportedError(f"{read.path}: partial_rotary_factor is not supported in this family, expected 1.0")
    turned = int(head_dim * positive(share, "partial_rotary_factor", read.path))
    if turned % 2 or not 0 < turned <= head_dim:
        raise CheckpointError(
            f"{read.path}: partial_rotary_factor {share} turns {turned} of the {head_dim} channels of a head, expected "
            "an even number of them"
        )
    return turned


def _parse_rope(read: Fields, positions: int, rotary_head_dim: int) -> RopeConfig:
    """RoPE from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (transformers 4)."""
    path = read.path
    scaling = _rope_parameters(read)
    rope_type = _first_of(scaling, "rope_type", "type")
    if rope_type is None and scaling.get("factor") not in (None, 1, 1.0):
        raise CheckpointError(
            f"{path}: rope parameters have the factor {scaling['factor']!r:.40} and no rope_type: expected one of "
            f"{', '.join(ROPE_TYPES)} beside it"
        )
    rope_type = "default" if rope_type is None else rope_type
    if rope_type not in ROPE_TYPES:
        raise UnsupportedError(
            f"{path}: rope_type {rope_type!r:.60} is not supported, expected {', '.join(ROPE_TYPES)}"
        )

    def number(key: str, default: float | None = None) -> float:
        return positive(scaling.get(key, default), f"rope {key}", path)

    def optional(key: str) -> float | None:
        return None if scaling.get(key) is None else number(key)

    theta = (
        positive(scaling["rope_theta"], "rope_theta", path)
        if scaling.get("rope_theta") is not None
        else read.positive("rope_theta", 10000.0)
    )
    if rope_type == "default":
        return RopeConfig(rope_theta=theta)
    if rope_type == "linear":
        return RopeConfig(rope_type, theta, factor=number("factor"))
    own = read.get("original_max_position_embeddings")  # beside the others, as Phi's and transformers 5's have it
    original = whole(scaling.get("original_max_position_embeddings") or own or positions)
    if isinstance(original, bool) or not isinstance(original, int) or not 0 < original < 1 << 31:
        raise CheckpointError(f"{path}: original_max_position_embeddings is {original!r:.40}, expected a token count")
    if rope_type == "longrope":
        return RopeConfig(
            rope_type,
            theta,
            positions / original if own else number("factor", positions / original),
            original,
            attention_factor=optional("attention_factor"),
            short_factor=_pair_factors(scaling, "short_factor", rotary_head_dim // 2, path),
            long_factor=_pair_factors(scaling, "long_factor", rotary_head_dim // 2, path),
        )
    if rope_type == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if low >= high:
            raise CheckpointError(f"{path}: rope low_freq_factor {low} must be below high_freq_factor {high}")
        return RopeConfig(rope_type, theta, number("factor"), original, low_freq_factor=low, high_freq_factor=high)
    return RopeConfig(
        rope_type,
        theta,
        number("factor"),
        original,
        attention_factor=optional("attention_factor"),
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=bool(scaling.get("truncate", True)),
    )


def _pair_factors(scaling: Mapping[str, Any], key: str, pairs: int, path: Path) -> tuple[float, ...]:
    """LongRoPE's divisor of each pair's inverse frequency; raises CheckpointError unless there is one for each."""
    given = scaling.get(key)
    if not isinstance(given, list) or len(given) != pairs:
        raise CheckpointError(f"{path}: rope {key} is {str(given)[:60]}, expected a list of {pairs} numbers")
    return tuple(positive(one, f"rope {key}", path) for one in given)
