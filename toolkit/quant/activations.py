"""What becomes of a linear's input where the bundle runs.

int8 by blocks along the features, scaled by the largest, as MatMulNBits has it at accuracy_level 4 (ONNX Runtime's
MLAS, QuantizeARow of SQNBitGemm's CompInt8 path: symmetric, round half to even, one scale a block); or uint16 in one
range for the tensor (quant/ranges.py), where one channel many times the others costs them all their precision.
T tokens, K features.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from toolkit.device.arrays import device_of
from toolkit.quant.ranges import ActivationRange, rounded_to_uint16

Floats = NDArray[np.float32]


class Rounding(Enum):
    """What becomes of a linear's input before its product is taken."""

    NONE = "none"
    INT8 = "int8 by blocks"
    UINT16 = "uint16 by tensor"


@dataclass(frozen=True)
class InputSample:
    """What a text showed of an input: some tokens [T, K] on a device, and on the host the second moment of each
    channel [K], and its smallest and largest value [K]."""

    tokens: Floats
    moments: Floats
    low: Floats
    high: Floats

    def divided(self, scales: Floats) -> InputSample:
        """As it is once channels are divided by `scales` [K], which are positive."""
        moments = (self.moments / scales**2).astype(np.float32)
        tokens = self.tokens / device_of(self.tokens).from_host(scales)
        return InputSample(tokens, moments, self.low / scales, self.high / scales)

    def values(self) -> ActivationRange:
        """The smallest and the largest value among all channels."""
        return ActivationRange(float(self.low.min()), float(self.high.max()))

    def rounded(self, rounding: Rounding, block_size: int) -> Floats:
        """The tokens as the product sees them."""
        return rounded_input(self.tokens, rounding, block_size, self.values())


def rounded_input(x: Floats, rounding: Rounding, block_size: int, values: ActivationRange) -> Floats:
    """`x` [T, K] as the product sees it; blocks are for int8, the range of the tensor for uint16."""
    if rounding is Rounding.INT8:
        return rounded_activations(x, block_size)
    return rounded_to_uint16(x, values) if rounding is Rounding.UINT16 else x


def rounded_activations(x: Floats, block_size: int) -> Floats:
    """`x` [T, K] as the product sees it."""
    on = device_of(x)

    def rounded(some: Floats) -> Floats:
        T, K = some.shape
        if K % block_size:
            padded = on.zeros((T, -(-K // block_size) * block_size))
            padded[:, :K] = some
        else:
            padded = some
        blocks = padded.reshape(T, -1, block_size)
        scale = on.largest(abs(blocks), -1, keepdims=True) / np.float32(127)
        levels = on.rint(blocks / on.replaced_zeros(scale))
        return on.contiguous((levels * scale).reshape(T, -1)[:, :K])

    return on.by_rows(rounded, x)
