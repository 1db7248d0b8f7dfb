"""Round-to-nearest in blocks along the input features, in the layout of ORT's MatMulNBits.

N output features, K input features, J = ceil(K / block_size) blocks. `packed` is uint8 [N, J, block_size*bits/8], low
nibble first; `scales` float32 [N, J]; `zero_points` uint8 [N, ceil(J*bits/8)], or None for symmetric, where
the operator's default of 2^(bits-1) holds (com.microsoft.MatMulNBits in ORT's ContribOperators.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is stored. `block_size` is a power of two from 16 to 256."""

    bits: int = 4
    block_size: int = 32
    symmetric: bool = False

    def num_blocks(self, in_features: int) -> int:
        """J: the last block of a row is padded with zeros."""
        return -(-in_features // self.block_size)


@dataclass(frozen=True)
class QuantizedBlocks:
    """One matrix, quantized; see the module for shapes and dtypes."""

    packed: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None


def quantize_blocks(weight: NDArray[np.float32], spec: QuantSpec) -> QuantizedBlocks:
    """`weight` [N, K] to blocks.

    Symmetric uses the full range: the value of largest magnitude becomes -2^(bits-1) (llama.cpp's Q4_0, MLAS's
    default). Asymmetric forces 0 into the range, so padding and zeros are exact.
    """
    out_features, in_features = weight.shape
    J, levels = spec.num_blocks(in_features), (1 << spec.bits) - 1
    if padding := J * spec.block_size - in_features:
        weight = np.pad(weight, ((0, 0), (0, padding)))
    blocks = weight.reshape(out_features, J, spec.block_size)
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)
    if spec.symmetric:
        half = 1 << (spec.bits - 1)
        scales = np.where(-low > high, low, high) / np.float32(-half)
        zeros = np.full((out_features, J), half, np.float32)
    else:
        np.minimum(low, 0, out=low)
        np.maximum(high, 0, out=high)
        scales = (high - low) / np.float32(levels)
        zeros = np.clip(np.rint(-low * _inverse(scales)), 0, levels)
    q = blocks * _inverse(scales)[..., None]
    np.rint(q, out=q)
    q += zeros[..., None]
    np.clip(q, 0, levels, out=q)
    zero_points = None if spec.symmetric else _pack_last_axis(zeros.astype(np.uint8), spec.bits)
    return QuantizedBlocks(_pack_last_axis(q.astype(np.uint8), spec.bits), scales.astype(np.float32), zero_points)


def dequantize_blocks(blocks: QuantizedBlocks, spec: QuantSpec, in_features: int) -> NDArray[np.float32]:
    """The float32 [N, K] that ORT computes with: (q - zero_point) * scale."""
    out_features, J = blocks.scales.shape
    q = _unpack_last_axis(blocks.packed, spec.bits).astype(np.float32)
    if blocks.zero_points is None:
        q -= np.float32(1 << (spec.bits - 1))
    else:
        q -= _unpack_last_axis(blocks.zero_points, spec.bits)[:, :J, None]
    q *= blocks.scales[..., None]
    return q.reshape(out_features, J * spec.block_size)[:, :in_features]


def _inverse(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)


def _pack_last_axis(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """4 bits: two values a byte, the even one in the low nibble; an odd row ends in a zero nibble."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    return np.bitwise_or(values[..., ::2], np.left_shift(values[..., 1::2], 4, dtype=np.uint8))


def _unpack_last_axis(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
