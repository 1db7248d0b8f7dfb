"""The triangle of a small matrix and its inverse in float64 on the host, whatever the device."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def upper_and_inverse(matrix: Floats) -> tuple[Floats, Floats]:
    """U upper with U U' = a small positive definite matrix, and its inverse, by numpy's float64. Raises LinAlgError."""
    backwards = np.linalg.cholesky(matrix[::-1, ::-1].astype(np.float64))
    inverse = np.tril(np.linalg.inv(backwards))[::-1, ::-1]
    return backwards[::-1, ::-1].astype(np.float32), np.ascontiguousarray(inverse, np.float32)
