"""Blocks along the input features, in the layout of ORT's MatMulNBits and GatherBlockQuantized.

N output features, K input features, J = ceil(K / block_size) blocks a row. `packed` is uint8 [N, J, block_size*bits/8],
low nibble first; `scales` float32 [N, J]; `zero_points` uint8 [N, ceil(J*bits/8)], or None for symmetric, where the
operator's default of 2^(bits-1) holds (com.microsoft.MatMulNBits in ORT's ContribOperators.md).

Inside, blocks stand as columns, float32 [block_size, N*J]: a reduction over the leading axis runs at the speed of an
elementwise pass, over a trailing axis of 32 at a twentieth of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.quant.kquant import search_scales
from toolkit.quant.rounding import round_columns
from toolkit.quant.rtn import range_scales

Floats = NDArray[np.float32]
# (columns [block_size, n], bits, symmetric) -> (scales [n], zeros [n]); a new algorithm is one more row.
_ALGORITHMS: Final[dict[str, Callable[[Floats, int, bool], tuple[Floats, Floats]]]] = {
    "rtn": range_scales,
    "kquant": search_scales,
}
ALGORITHMS: Final = tuple(_ALGORITHMS)
# A tile and what is computed from it stay in a core's cache: half a megabyte of float32.
_TILE_ELEMENTS: Final = 1 << 17


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is stored. `block_size` is a power of two from 16 to 256."""

    bits: int = 4
    block_size: int = 32
    symmetric: bool = False
    algorithm: str = "rtn"

    def num_blocks(self, in_features: int) -> int:
        """J: the last block of a row is padded with zeros."""
        return -(-in_features // self.block_size)


@dataclass(frozen=True)
class QuantizedBlocks:
    """One matrix, quantized; see the module for shapes and dtypes. `noise` is the sum of squared errors."""

    packed: NDArray[np.uint8]
    scales: Floats
    zero_points: NDArray[np.uint8] | None
    noise: float


def quantize_blocks(weight: Floats, spec: QuantSpec) -> QuantizedBlocks:
    """`weight` [N, K] to blocks by the spec's algorithm. Zeros, padding included, stay exactly zero."""
    out_features, in_features = weight.shape
    J = spec.num_blocks(in_features)
    packed = np.empty((out_features, J, spec.block_size * spec.bits // 8), np.uint8)
    scales = np.empty((out_features, J), np.float32)
    zeros = np.empty((out_features, J), np.uint8)
    noise = 0.0
    step = max(1, _TILE_ELEMENTS // (J * spec.block_size))
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        noise += _quantize_tile(weight[rows], spec, packed[rows], scales[rows], zeros[rows])
    return QuantizedBlocks(packed, scales, None if spec.symmetric else _pack_last_axis(zeros, spec.bits), noise)


def _quantize_tile(
    weight: Floats, spec: QuantSpec, packed: NDArray[np.uint8], scales: Floats, zeros: NDArray[np.uint8]
) -> float:
    """Fills the rows of a tile; returns its sum of squared errors."""
    rows, J = scales.shape
    if padding := J * spec.block_size - weight.shape[1]:
        weight = np.pad(weight, ((0, 0), (0, padding)))
    columns = np.ascontiguousarray(weight.reshape(-1, spec.block_size).T)
    column_scales, column_zeros = _ALGORITHMS[spec.algorithm](columns, spec.bits, spec.symmetric)
    q = round_columns(columns, column_scales, column_zeros, spec.bits)
    packed[...] = _pack_leading_axis(q.astype(np.uint8), spec.bits).T.reshape(rows, J, -1)
    scales[...] = column_scales.reshape(rows, J)
    zeros[...] = column_zeros.reshape(rows, J)
    q -= column_zeros
    q *= column_scales
    q -= columns
    return float(np.vdot(q, q))


def dequantize_blocks(blocks: QuantizedBlocks, spec: QuantSpec, in_features: int) -> Floats:
    """The float32 [N, K] that ORT computes with: (q - zero_point) * scale."""
    out_features, J = blocks.scales.shape
    q = _unpack_last_axis(blocks.packed, spec.bits).astype(np.float32)
    if blocks.zero_points is None:
        q -= np.float32(1 << (spec.bits - 1))
    else:
        q -= _unpack_last_axis(blocks.zero_points, spec.bits)[:, :J, None]
    q *= blocks.scales[..., None]
    return q.reshape(out_features, J * spec.block_size)[:, :in_features]


def _pack_leading_axis(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[block_size, n] to [block_size*bits/8, n]; 4 bits: the even row is the low nibble."""
    if bits == 8:
        return values
    high = np.left_shift(values[1::2], 4)
    high |= values[::2]
    return high


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
