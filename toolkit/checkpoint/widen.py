"""Stored bytes as float32, whatever dtype they are stored in, and whether all of them are numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.gguf_blocks import dequantize
from toolkit.errors import NonFiniteError


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


def check_finite(values: NDArray[np.float32], name: str) -> None:
    """Raises NonFiniteError with the tensor and the count; one NaN or infinity makes the sum of squares one. So do
    weights beyond about 1e19, which no model has and no arithmetic in float32 survives."""
    flat = values.reshape(-1)
    if np.isfinite(np.vdot(flat, flat)):
        return
    bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    if bad == 0:
        raise NonFiniteError(
            f"{name} holds values of up to {float(np.abs(flat).max()):.3g}, whose squares float32 cannot hold: it is "
            "damaged, compare its hash"
        )
    raise NonFiniteError(
        f"{name} holds {bad} NaN or infinite values: it was published so, or is damaged: compare its hash"
    )
