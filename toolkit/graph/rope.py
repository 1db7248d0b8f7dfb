"""Rotary caches for GroupQueryAttention: cos and sin, float32 [positions, head_dim / 2]."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.rope_config import RopeConfig


def rotary_caches(
    config: ModelConfig, rope: RopeConfig, context_length: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of position x frequency, computed in float64; the attention factor of YaRN and LongRoPE multiplies
    both. [context_length, head_dim / 2] each; behind the short texts' [switch, head_dim / 2] where LongRoPE has two.

    Pairs that padding added, or that RoPE leaves as they are, stand still.
    """
    switch = rope.switch(context_length)
    tables = [_caches(config, rope, context_length, is_long=switch is not None)]
    if switch is not None:
        tables.insert(0, _caches(config, rope, switch, is_long=False))
    cos, sin = (np.concatenate(parts).astype(np.float32) for parts in zip(*tables, strict=True))
    return cos, sin


def _caches(
    config: ModelConfig, rope: RopeConfig, rows: int, is_long: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """cos and sin [rows, head_dim / 2] of the positions from 0 on."""
    frequencies = inverse_frequencies(rope, config.rotary_head_dim, is_long)
    factors = np.full(frequencies.shape, attention_factor(rope))
    still = (0, (config.head_dim - config.rotary_head_dim) // 2)
    if config.structure.latent is None:
        frequencies, factors = np.pad(frequencies, still), np.pad(factors, still, constant_values=1)
    angles = np.arange(rows, dtype=np.float64)[:, None] * frequencies
    return np.cos(angles) * factors, np.sin(angles) * factors


def inverse_frequencies(rope: RopeConfig, head_dim: int, is_long: bool = False) -> NDArray[np.float64]:
    """Returns the angles, [head_dim / 2], in radians per position; `is_long` takes LongRoPE's long factors."""
    plain = rope.rope_theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.rope_type == "linear":
        return plain / rope.factor
    if rope.rope_type == "llama3":
        # Blend by how many turns a pair makes over the original context (Llama 3.1's rope scaling).
        turns = rope.original_max_position_embeddings * plain / (2 * math.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0, 1)
        return plain * keep + plain / rope.factor * (1 - keep)
    if rope.rope_type == "yarn":
        return _yarn(rope, head_dim, plain)
    if rope.rope_type == "longrope":
        factors = np.array(rope.long_factor if is_long else rope.short_factor)
        return np.asarray(plain / factors)
    return plain


def _yarn(rope: RopeConfig, head_dim: int, plain: NDArray[np.float64]) -> NDArray[np.float64]:
    """NTK-by-parts interpolation, arXiv 2309.00071 section 3.2."""

    def pair_with_turns(turns: float) -> float:
        wavelengths = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.rope_theta))

    low, high = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / (max(high - low, 0.001)), 0, 1)
    return np.asarray(plain / rope.factor * ramp + plain * (1 - ramp))


def attention_factor(rope: RopeConfig) -> float:
    """Returns what cos and sin are multiplied by: 1 unless YaRN (arXiv 2309.00071 section 3.4) or LongRoPE
    (arXiv 2402.13753 section 3.3)."""
    if rope.rope_type not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.rope_type == "longrope":
        return math.sqrt(1 + math.log(max(rope.factor, 1)) / math.log(rope.original_max_position_embeddings))

    def magnitude(scale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
