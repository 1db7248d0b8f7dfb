"""Codes of eight bits and their scales to float32, by loops compiled here.

A weight is its code's value times its scale in float32, one rounding: what torch makes of `codes.float() * scale`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from toolkit.jit import CompilerOptions, machine_code

Floats = NDArray[np.float32]
_OPTIONS: Final[CompilerOptions] = {"nogil": True, "error_model": "numpy"}


def _e4m3() -> Floats:
    """The value of each of the 256 codes: sign, four bits of exponent (bias 7), three of mantissa, no infinities."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[(codes & 127) == 127] = np.nan
    return np.asarray(np.where(codes < 128, size, -size), np.float32)


E4M3: Final = _e4m3()
# Powers of two alone, 2^-127 the least; the last code is NaN.
E8M0: Final = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan)).astype(np.float32)
# The values of codes by the dtype that safetensors gives them.
TABLES: Final = {
    "F8_E4M3": E4M3,
    "F8_E8M0": E8M0,
    "I8": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32),
}


def decode_bytes(codes: NDArray[np.uint8], table: Floats, scales: Floats, block: tuple[int, int], first: int) -> Floats:
    """Rows of a matrix, the first of which is row `first` of it: [rows, columns] codes to as many floats.

    `scales` are those of the whole matrix, one for each `block` of rows and columns. Raises MachineError without numba.
    """
    values = np.empty(codes.shape, np.float32)
    _bytes(codes, table, scales, block[0], block[1], first, values)
    return values


def _compiled(function: Any) -> Any:
    return machine_code(function, _OPTIONS, "reading quantized weights")


@_compiled
def _bytes(codes: Any, table: Any, scales: Any, block_rows: Any, block_columns: Any, first: Any, values: Any) -> None:
    """Each code's value times the scale of its block; the last blocks may be cut."""
    width = codes.shape[1]
    for i in range(codes.shape[0]):
        code, row, scale = codes[i], values[i], scales[(first + i) // block_rows]
        for j in range(scale.shape[0]):
            step = scale[j]
            for k in range(j * block_columns, min(width, (j + 1) * block_columns)):
                row[k] = table[code[k]] * step
