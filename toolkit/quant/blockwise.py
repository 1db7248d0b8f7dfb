"""Blocks along the input features, in the layout of ORT's MatMulNBits and GatherBlockQuantized.

N output features, K input features, J = ceil(K / block_size) blocks a row. `packed` is uint8 [N, J, block_size*bits/8],
low nibble first; `scales` float32 [N, J]; `zero_points` uint8 [N, ceil(J*bits/8)], or None for symmetric, where the
operator's default of 2^(bits-1) holds (com.microsoft.MatMulNBits in ORT's ContribOperators.md).

Algorithms are rows of toolkit/algorithms.py:
- `rtn` takes the scale from the range of a block.
- `kquant` tries seven ranges around it and keeps, block by block, what minimizes sum w (x - scale (q - zero))^2 with
  w = rms(block) + |x|. For given integers l = q - zero the best scale is S(wxl)/S(wll), which removes S(wxl)^2/S(wll)
  from the error, so candidates are compared by that alone. After llama.cpp's make_qkx2_quants and make_qx_quants; those
  let the offset be any float and round it at the end, MatMulNBits takes integers, so here each candidate is judged with
  its zero point already rounded.
- `imatrix` is the same search with w the importance of each column: the second moment of its input makes that sum the
  expected squared error of the output, inputs taken as independent (llama.cpp's imatrix).
- `gptq` has a file of its own.

Where scales are `short_scales` they are rounded to bfloat16 before any integer is, so that integers are nearest to what
is stored. A scale then errs by 1/512 at most, which is nothing beside 4 bits, and any finite weight has one: float16,
as long, could hold those of weights from about 1e-4 to 1e5 (LOG.md).

`signed` specs are for DequantizeLinear with zero point 0 (quant/signed_kernel.py): the same layout here, levels around
2^(bits-1), and positive scales; graphs hold them turned, input features first (`signed_integers`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.algorithms import ALGORITHMS, Algorithm
from toolkit.quant import kernel, signed_kernel

Floats = NDArray[np.float32]
_LEAST_IMPORTANCE: Final = 1e-6


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is stored. `block_size` is a power of two from 16 to 256; where `signed` it divides the input
    features, and may be all of them. `short_scales` are bfloat16, others have the dtype of the tensor's floats."""

    bits: int = 4
    block_size: int = 32
    symmetric: bool = False
    algorithm: str = "rtn"
    signed: bool = False
    short_scales: bool = False

    def num_blocks(self, in_features: int) -> int:
        """J: the last block of a row is padded with zeros."""
        return -(-in_features // self.block_size)

    @property
    def rounded_by(self) -> Algorithm:
        """The row of ALGORITHMS that its algorithm names."""
        return ALGORITHMS[self.algorithm]


@dataclass(frozen=True)
class QuantizedBlocks:
    """One matrix, quantized; see the module for shapes and dtypes. `noise` is the sum of squared errors."""

    packed: NDArray[np.uint8]
    scales: Floats
    zero_points: NDArray[np.uint8] | None
    noise: float


def quantize_blocks(weight: Floats, spec: QuantSpec, importance: Floats | None = None) -> QuantizedBlocks:
    """`weight` [N, K] to blocks by the spec's algorithm, on one core and without the interpreter's lock.

    Zeros, padding included, stay exactly zero. `importance` [K], not negative, weighs the errors of the search where
    the algorithm is one that reads text.
    """
    out_features, in_features = weight.shape
    J = spec.num_blocks(in_features)
    weight = np.ascontiguousarray(weight, np.float32)
    worth = weights_of_errors(importance if spec.rounded_by.reads_text else None)
    packed = np.empty((out_features, J, spec.block_size * spec.bits // 8), np.uint8)
    scales = np.empty((out_features, J), np.float32)
    if spec.signed:
        choose = getattr(signed_kernel, spec.rounded_by.signed_scales)
        choose(weight, worth, spec.bits, spec.block_size, scales)
        noise = signed_kernel.round_signed_rows(weight, spec.bits, spec.block_size, scales, packed)
        return QuantizedBlocks(packed, scales, None, noise)
    zeros = np.empty((out_features, J), np.uint8)
    choose = getattr(kernel, spec.rounded_by.scales)
    choose(weight, worth, spec.bits, spec.symmetric, spec.block_size, scales, zeros)
    if spec.short_scales:
        kernel.shorten(scales)
    noise = kernel.round_rows(weight, spec.bits, spec.block_size, scales, zeros, packed)
    return QuantizedBlocks(packed, scales, None if spec.symmetric else pack_last_axis(zeros, spec.bits), noise)


def weights_of_errors(importance: Floats | None) -> Floats:
    """In the kernel's terms: to a mean of 1, which keeps its products in float32's range, and never quite nothing: a
    channel that the text left silent keeps its weights. Empty for none."""
    if importance is None or not importance.any():
        return np.empty(0, np.float32)
    relative = np.maximum(importance / importance.mean(dtype=np.float64), _LEAST_IMPORTANCE)
    return np.asarray(relative, np.float32)


def dequantize_blocks(blocks: QuantizedBlocks, spec: QuantSpec, in_features: int) -> Floats:
    """The float32 [N, K] that ORT computes with: (q - zero_point) * scale."""
    out_features, J = blocks.scales.shape
    q = levels_of(blocks, spec)
    q *= blocks.scales[..., None]
    return q.reshape(out_features, J * spec.block_size)[:, :in_features]


def levels_of(blocks: QuantizedBlocks, spec: QuantSpec) -> Floats:
    """The integers less their zero points, float32 [N, J, block_size]."""
    q = _unpack_last_axis(blocks.packed, spec.bits).astype(np.float32)
    if blocks.zero_points is None:
        q -= np.float32(1 << (spec.bits - 1))
    else:
        q -= _unpack_last_axis(blocks.zero_points, spec.bits)[:, : blocks.scales.shape[1], None]
    return q


def signed_integers(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Columns of a signed matrix, uint8 [N, k * bits / 8] as packed here, as DequantizeLinear and MatMul want it:
    [k, N] in two's complement. 4 bits are two a byte, the even one in the low nibble (onnx.proto, INT4)."""
    levels = _unpack_last_axis(packed, bits)
    integers = np.ascontiguousarray((levels ^ np.uint8(1 << (bits - 1))).T).reshape(-1)
    if bits == 8:
        return integers
    return np.bitwise_or(integers[::2], np.left_shift(integers[1::2], 4, dtype=np.uint8))


def signed_levels(integers: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """The values [n] of what `signed_integers` made."""
    if bits == 8:
        return integers.view(np.int8)
    return (_unpack_last_axis(integers, bits) ^ np.uint8(8)).view(np.int8) - np.int8(8)


def pack_last_axis(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
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
