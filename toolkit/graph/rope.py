"""Rotary caches for GroupQueryAttention: cos and sin, float32 [context_length, head_dim / 2]."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.config import ModelConfig, RopeConfig


def rotary_caches(config: ModelConfig, context_length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of position x frequency, computed in float64; YaRN's attention factor multiplies both.

    Pairs that padding added stand still.
    """
    frequencies = inverse_frequencies(config.rope, config.rotary_head_dim)
    if config.structure.latent is None:
        frequencies = np.pad(frequencies, (0, (config.head_dim - config.rotary_head_dim) // 2))
    angles = np.arange(context_length, dtype=np.float64)[:, None] * frequencies
    factor = attention_factor(config.rope)
    return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(np.float32)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> NDArray[np.float64]:
    """Returns the angles, [head_dim / 2], in radians per position."""
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
    """Returns what cos and sin are multiplied by: 1 unless YaRN (arXiv 2309.00071 section 3.4)."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(scale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
