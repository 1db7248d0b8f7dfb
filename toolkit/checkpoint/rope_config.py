"""RoPE's parameters, as a config.json of transformers 4 or 5 has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from toolkit.checkpoint.family import LAYER_KINDS
from toolkit.checkpoint.fields import Fields, positive, whole
from toolkit.errors import CheckpointError, UnsupportedError

ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn", "longrope")


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


def rotary_head_dim_of(read: Fields, head_dim: int, partial: bool) -> int:
    """How many channels of a head RoPE turns: all of them, or, in families where that may be, the first part."""
    share = _rope_parameters(read, "full_attention").get("partial_rotary_factor", read.get("partial_rotary_factor"))
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


def parse_rope(read: Fields, positions: int, rotary_head_dim: int, kind: str = "") -> RopeConfig:
    """RoPE from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (transformers 4), of layers of a
    kind where a family's kinds may differ."""
    path = read.path
    scaling = _rope_parameters(read, kind)
    rope_type = _rope_type(scaling, path)

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
        factor = positions / original if own else number("factor", positions / original)
        short, long = (
            _pair_factors(scaling, f"{kind}_factor", rotary_head_dim // 2, path) for kind in ("short", "long")
        )
        attention = optional("attention_factor")
        return RopeConfig(
            rope_type, theta, factor, original, attention_factor=attention, short_factor=short, long_factor=long
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


def _rope_type(scaling: Mapping[str, Any], path: Path) -> str:
    rope_type = _first_of(scaling, "rope_type", "type")
    if rope_type is None and scaling.get("factor") not in (None, 1, 1.0):
        raise CheckpointError(
            f"{path}: rope parameters have the factor {scaling['factor']!r:.40} and no rope_type: expected one of "
            f"{', '.join(ROPE_TYPES)} beside it"
        )
    if rope_type not in (None, *ROPE_TYPES):
        raise UnsupportedError(
            f"{path}: rope_type {rope_type!r:.60} is not supported, expected {', '.join(ROPE_TYPES)}"
        )
    return str(rope_type or "default")


def _first_of(values: Mapping[str, Any], *keys: str) -> Any:
    """The first of the values that is there and not null."""
    return next((values[key] for key in keys if values.get(key) is not None), None)


def _rope_parameters(read: Fields, kind: str) -> dict[str, Any]:
    """RoPE's parameters; those that transformers 5 writes for each kind of layer must be alike unless one is asked
    for."""
    given = read.get("rope_parameters") or read.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"{read.path}: rope parameters are {given!r:.60}, expected an object")
    by_kind = [given[kind] for kind in LAYER_KINDS if kind in given]
    if not by_kind:
        return given
    if kind and isinstance(given.get(kind), dict):
        return dict(given[kind])
    if not all(isinstance(one, dict) and one == by_kind[0] for one in by_kind):
        raise UnsupportedError(f"{read.path}: RoPE differs between kinds of layers, which is not supported")
    return dict(by_kind[0])


def _pair_factors(scaling: Mapping[str, Any], key: str, pairs: int, path: Path) -> tuple[float, ...]:
    """LongRoPE's divisor of each pair's inverse frequency; raises CheckpointError unless there is one for each."""
    given = scaling.get(key)
    if not isinstance(given, list) or len(given) != pairs:
        raise CheckpointError(f"{path}: rope {key} is {str(given)[:60]}, expected a list of {pairs} numbers")
    return tuple(positive(one, f"rope {key}", path) for one in given)
