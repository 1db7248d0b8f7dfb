"""Stored bytes as float32, whatever dtype they are stored in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.gguf_blocks import dequantize


def widen(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Stored bytes as flat float32: BF16, F16 and F32 exactly, F64 rounded, GGUF's types as llama.cpp reads them."""
    if dtype == "F32":
        return raw.view("<f4").astype(np.float32, copy=False)
    if dtype == "F16":
        return raw.view("<f2").astype(np.float32)
    if dtype == "F64":
        with np.errstate(over="ignore"):  # what float32 does not hold is infinite, and then named as such
            return raw.view("<f8").astype(np.float32)
    if dtype == "BF16":
        return np.asarray(np.left_shift(raw.view("<u2"), 16, dtype=np.uint32).view(np.float32))
    return dequantize(raw, dtype)
