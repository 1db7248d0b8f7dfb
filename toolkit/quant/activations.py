"""What MatMulNBits does to its input at accuracy_level 4: int8 by blocks along the features, scaled by the largest.

ONNX Runtime's MLAS, QuantizeARow of SQNBitGemm's CompInt8 path: symmetric, round half to even, one scale a block.
T tokens, K features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def rounded_activations(x: Floats, block_size: int) -> Floats:
    """`x` [T, K] as the product sees it."""
    T, K = x.shape
    padded = np.zeros((T, -(-K // block_size) * block_size), np.float32)
    padded[:, :K] = x
    blocks = padded.reshape(T, -1, block_size)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    levels = np.rint(blocks / np.where(scale > 0, scale, np.float32(1)))
    return np.ascontiguousarray((levels * scale).reshape(T, -1)[:, :K])
