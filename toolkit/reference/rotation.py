"""Queries and keys turned by their position: RoPE as each family and each scaling of it has it. T tokens, Dh the width
that is rotated."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.rope_config import RopeConfig
from toolkit.device.arrays import device_of

Array = NDArray[np.float32]


def rotate_neighbours(x: Array, cos: Array, sin: Array) -> Array:
    """Returns [T, H, Dh] with the pairs (2i, 2i + 1) rotated, as DeepSeek's latent attention stores them."""
    on, (a, b) = device_of(x), (x[..., ::2], x[..., 1::2])
    cos, sin = on.from_host(cos), on.from_host(sin)
    return on.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Returns [T, H, Dh] with the pairs (i, i + Dh/2) rotated, as most families store them. Each half of a padded head
    ends in channels without an angle, which stay."""
    on, half = device_of(x), x.shape[-1] // 2
    unturned = ((0, 0), (0, 0), (0, half - cos.shape[-1]))
    cos, sin = on.from_host(np.pad(cos, unturned, constant_values=1)), on.from_host(np.pad(sin, unturned))
    first, second = x[..., :half], x[..., half:]
    return on.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotation(rope: RopeConfig, head_dim: int, positions: NDArray[np.int64]) -> tuple[Array, Array]:
    """Returns cos and sin [T, 1, Dh/2] at `positions`; each pair's wavelength decides its scaling, and under LongRoPE
    the length of the text that a position belongs to, which runs on while positions do."""
    scale = 1.0
    frequencies = []
    for pair in range(head_dim // 2):
        frequency = 1.0 / rope.rope_theta ** (2 * pair / head_dim)
        frequencies.append(_scaled(rope, frequency, pair, head_dim))
    if rope.rope_type == "yarn":
        scale = _yarn_scale(rope)
    angles = np.outer(positions, frequencies)
    if rope.rope_type == "longrope":
        scale = _longrope_scale(rope)
        texts = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
        ends = np.concatenate([np.full(text.shape, text[-1] + 1) for text in texts])
        is_long = ends > rope.original_max_position_embeddings
        angles /= np.where(is_long[:, None], rope.long_factor, rope.short_factor)
    return (
        (scale * np.cos(angles)).astype(np.float32)[:, None, :],
        (scale * np.sin(angles)).astype(np.float32)[:, None, :],
    )


def _scaled(rope: RopeConfig, frequency: float, pair: int, head_dim: int) -> float:
    if rope.rope_type == "linear":
        return frequency / rope.factor
    original = rope.original_max_position_embeddings
    if rope.rope_type == "llama3":
        wavelength = 2 * math.pi / frequency
        if wavelength < original / rope.high_freq_factor:
            return frequency
        if wavelength > original / rope.low_freq_factor:
            return frequency / rope.factor
        smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return (1 - smooth) * frequency / rope.factor + smooth * frequency
    if rope.rope_type == "yarn":
        bounds = [
            head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))
            for turns in (rope.beta_fast, rope.beta_slow)
        ]
        if rope.truncate:
            bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
        low, high = max(bounds[0], 0), min(bounds[1], head_dim - 1)
        interpolated = min(max((pair - low) / ((high - low) or 0.001), 0.0), 1.0)
        return frequency * (1 - interpolated) + frequency / rope.factor * interpolated
    return frequency


def _longrope_scale(rope: RopeConfig) -> float:
    if rope.attention_factor is not None or rope.factor <= 1:
        return rope.attention_factor or 1.0
    return math.sqrt(1 + math.log(rope.factor, rope.original_max_position_embeddings))


def _yarn_scale(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    log = 0.1 * math.log(rope.factor)
    if rope.mscale and rope.mscale_all_dim:
        return (log * rope.mscale + 1) / (log * rope.mscale_all_dim + 1)
    return log + 1
