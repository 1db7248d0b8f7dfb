"""Codes and their scales to float32, by loops compiled here.

A weight is its code's value times its scale in float32, one rounding: what torch makes of `codes.float() * scale`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from toolkit.jit import CompilerOptions, machine_code

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
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
_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# What the codes of each kind stand for; integers without zero points stand around the middle of their range.
TABLES: Final = {
    "F8_E4M3": E4M3,
    "I8": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32),
    "INT8": np.arange(-128, 128).astype(np.float32),
    "INT4": np.arange(-8, 8).astype(np.float32),
    "INT2": np.arange(-2, 2).astype(np.float32),
    "E2M1": np.array([*_E2M1, *(-value for value in _E2M1)], np.float32),
}
# Where each of eight neighbours stands in a word of AWQ's.
AWQ_PLACES: Final = np.array([0, 4, 1, 5, 2, 6, 3, 7], np.int64)


def decode_blocks(codes: Codes, table: Floats, scales: Floats, block: tuple[int, int], first: int) -> Floats:
    """Rows of a matrix, the first of which is row `first` of it: [rows, columns] codes to as many floats.

    `scales` are those of the whole matrix, one for each `block` of rows and columns. Raises MachineError without numba.
    """
    values = np.empty(codes.shape, np.float32)
    _blocks(codes, table, scales, block[0], block[1], first, values)
    return values


def decode_groups(codes: Codes, zeros: Floats, scales: Floats, groups: NDArray[np.int64]) -> Floats:
    """Rows of codes less their zero points, times their scales: [rows, groups] of both, `groups` with the one of each
    column. Raises MachineError without numba."""
    values = np.empty(codes.shape, np.float32)
    _groups(codes, zeros, scales, groups, values)
    return values


def unpack_pairs(raw: Codes, columns: int) -> Codes:
    """Codes of four bits from bytes [rows, bytes of a row] that hold two, the lower half first."""
    codes = np.empty((raw.shape[0], columns), np.uint8)
    _pairs(raw, codes)
    return codes


def unpack_gptq(words: NDArray[np.uint32], bits: int, start: int, stop: int, columns: int) -> Codes:
    """Rows [start, stop) of a weight whose input features stand in words [input / (32 / bits), output]."""
    codes = np.empty((stop - start, columns), np.uint8)
    _gptq(words, bits, start, codes)
    return codes


def unpack_awq(words: NDArray[np.uint32], start: int, stop: int) -> Codes:
    """Rows [start, stop) of a weight whose output features stand in AWQ's order in words [input, output / 8]."""
    codes = np.empty((stop - start, words.shape[0]), np.uint8)
    _awq(words, AWQ_PLACES, start, codes)
    return codes


def _compiled(function: Any) -> Any:
    return machine_code(function, _OPTIONS, "reading quantized weights")


@_compiled
def _blocks(codes: Any, table: Any, scales: Any, block_rows: Any, block_columns: Any, first: Any, values: Any) -> None:
    """Each code's value times the scale of its block; the last blocks may be cut."""
    width = codes.shape[1]
    for i in range(codes.shape[0]):
        code, row, scale = codes[i], values[i], scales[(first + i) // block_rows]
        for j in range(scale.shape[0]):
            step = scale[j]
            for k in range(j * block_columns, min(width, (j + 1) * block_columns)):
                row[k] = table[code[k]] * step


@_compiled
def _groups(codes: Any, zeros: Any, scales: Any, groups: Any, values: Any) -> None:
    """Each code less the zero point of its group, times its scale."""
    for i in range(codes.shape[0]):
        code, row, zero, scale = codes[i], values[i], zeros[i], scales[i]
        for k in range(codes.shape[1]):
            group = groups[k]
            row[k] = (np.float32(code[k]) - zero[group]) * scale[group]


@_compiled
def _pairs(raw: Any, codes: Any) -> None:
    """The lower half of a byte, then the upper one."""
    for i in range(codes.shape[0]):
        pair, code = raw[i], codes[i]
        for k in range(codes.shape[1]):
            code[k] = (pair[k >> 1] >> (4 * (k & 1))) & 15


@_compiled
def _gptq(words: Any, bits: Any, start: Any, codes: Any) -> None:
    """Codes along a column of words, from the lowest bits on; eight columns at a time, which the cache can hold."""
    per, mask = 32 // bits, (1 << bits) - 1
    for first in range(0, codes.shape[0], 8):
        for r in range(words.shape[0]):
            for i in range(first, min(first + 8, codes.shape[0])):
                word = np.int64(words[r, start + i])
                for j in range(min(per, codes.shape[1] - r * per)):
                    codes[i, r * per + j] = (word >> (bits * j)) & mask


@_compiled
def _awq(words: Any, places: Any, start: Any, codes: Any) -> None:
    """The codes of eight output features from the word that has them; the first and last word may be cut."""
    stop = start + codes.shape[0]
    for column in range(start >> 3, (stop + 7) >> 3):
        first, last = max(start, 8 * column), min(stop, 8 * column + 8)
        for k in range(words.shape[0]):
            word = np.int64(words[k, column])
            for row in range(first, last):
                codes[row - start, k] = (word >> (4 * places[row & 7])) & 15
