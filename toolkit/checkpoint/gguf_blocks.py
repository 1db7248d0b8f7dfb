"""Blocks of GGUF's number formats to float32: the common ones by loops compiled here, the others by the `gguf` package.

Each loop does what llama.cpp's dequantize_row_* does (ggml-quants.c), in float32 and in the same order, so that a
weight comes out the same to the bit. Scales are float16 and come through a table of all 65,536.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.gguf_types import TYPE_BY_NAME
from toolkit.errors import CheckpointError, MachineError
from toolkit.jit import CompilerOptions, machine_code

_F = np.float32
# Sums and products as they are written: what is read has to be what llama.cpp reads.
_OPTIONS: Final[CompilerOptions] = {"nogil": True, "error_model": "numpy"}
_HALVES: Final = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def dequantize(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Whole blocks of a type, such as Q4_K, as a flat float32 array.

    Raises MachineError for a rare type where the `gguf` package is missing, or for any where numba is.
    """
    kind = TYPE_BY_NAME[dtype]
    if dtype not in _LOOPS:
        return _by_package(raw, dtype)
    blocks = raw.reshape(-1, kind.nbytes)
    values = np.empty((blocks.shape[0], kind.block), np.float32)
    _LOOPS[dtype](blocks, _HALVES, values)
    return values.reshape(-1)


def _by_package(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    try:
        import gguf
    except ImportError:
        raise MachineError(
            f"weights of the type {dtype} need the gguf package, which is not installed: "
            "pip install 'onnx-distill-toolkit[gguf]'"
        ) from None
    try:
        kind = gguf.GGMLQuantizationType[dtype]
        return np.asarray(gguf.dequantize(raw.reshape(1, -1), kind), np.float32).reshape(-1)
    except (KeyError, NotImplementedError):
        raise MachineError(f"the gguf package here does not know {dtype}: pip install --upgrade gguf") from None
    except ValueError as problem:
        raise CheckpointError(f"blocks of {dtype} cannot be read: {problem}") from None


def _compiled(function: Any) -> Any:
    return machine_code(function, _OPTIONS, "reading quantized weights of a GGUF file")


@_compiled
def _half(halves: Any, block: Any, at: int) -> Any:
    """Returns the float16 that begins at a byte of a block, as float32 by the table `halves`."""
    return halves[np.int64(block[at]) | (np.int64(block[at + 1]) << 8)]


@_compiled
def _q4_0(blocks: Any, halves: Any, values: Any) -> None:
    """Scale, then 32 levels of 4 bits around 8: the low halves of 16 bytes, then the high ones."""
    for n in range(blocks.shape[0]):
        block, row = blocks[n], values[n]
        scale = _half(halves, block, 0)
        for j in range(16):
            byte = np.int64(block[2 + j])
            row[j] = scale * _F((byte & 15) - 8)
            row[j + 16] = scale * _F((byte >> 4) - 8)


@_compiled
def _q4_1(blocks: Any, halves: Any, values: Any) -> None:
    """Scale and minimum, then 32 levels of 4 bits."""
    for n in range(blocks.shape[0]):
        block, row = blocks[n], values[n]
        scale, least = _half(halves, block, 0), _half(halves, block, 2)
        for j in range(16):
            byte = np.int64(block[4 + j])
            row[j] = scale * _F(byte & 15) + least
            row[j + 16] = scale * _F(byte >> 4) + least


@_compiled
def _q5_0(blocks: Any, halves: Any, values: Any) -> None:
    """Scale, 32 fifth bits, then 32 levels' lower bits as in Q4_0; levels stand around 16."""
    for n in range(blocks.shape[0]):
        block, row = blocks[n], values[n]
        scale, high = _half(halves, block, 0), _fifth_bits(block, 2)
        for j in range(16):
            byte = np.int64(block[6 + j])
            row[j] = scale * _F(((byte & 15) | (((high >> j) & 1) << 4)) - 16)
            row[j + 16] = scale * _F(((byte >> 4) | (((high >> (j + 16)) & 1) << 4)) - 16)


@_compiled
def _q5_1(blocks: Any, halves: Any, values: Any) -> None:
    """Scale and minimum, 32 fifth bits, then the lower bits."""
    for n in range(blocks.shape[0]):
        block, row = blocks[n], values[n]
        scale, least, high = _half(halves, block, 0), _half(halves, block, 2), _fifth_bits(block, 4)
        for j in range(16):
            byte = np.int64(block[8 + j])
            row[j] = scale * _F((byte & 15) | (((high >> j) & 1) << 4)) + least
            row[j + 16] = scale * _F((byte >> 4) | (((high >> (j + 16)) & 1) << 4)) + least


@_compiled
def _fifth_bits(block: Any, at: int) -> Any:
    """Four bytes of a block as one number."""
    low = np.int64(block[at]) | (np.int64(block[at + 1]) << 8)
    return low | (np.int64(block[at + 2]) << 16) | (np.int64(block[at + 3]) << 24)


@_compiled
def _q8_0(blocks: Any, halves: Any, values: Any) -> None:
    """Scale, then 32 signed bytes."""
    for n in range(blocks.shape[0]):
        block, row = blocks[n], values[n]
        scale = _half(halves, block, 0)
        for j in range(32):
            row[j] = _F(np.int8(block[2 + j])) * scale


@_compiled
def _six_bits(block: Any, at: int, j: int) -> Any:
    """The scale and the minimum of stretch `j` of eight: 6 bits each in twelve bytes (get_scale_min_k4)."""
    if j < 4:
        return np.int32(block[at + j]) & 63, np.int32(block[at + j + 4]) & 63
    last = np.int32(block[at + j + 4])
    scale = (last & 15) | ((np.int32(block[at + j - 4]) >> 6) << 4)
    return scale, (last >> 4) | ((np.int32(block[at + j]) >> 6) << 4)


@_compiled
def _q4_k(blocks: Any, halves: Any, values: Any) -> None:
    """Scales of the scales and minima, twelve bytes of both, then 256 levels of 4 bits, 64 in each 32 bytes."""
    for n in range(blocks.shape[0]):
        block, row = blocks[n], values[n]
        d, dmin = _half(halves, block, 0), _half(halves, block, 2)
        for j in range(8):
            scale, least = _six_bits(block, 4, j)
            step, low = d * _F(scale), dmin * _F(least)
            first, shift = 16 + (j // 2) * 32, 4 * (j % 2)
            for i in range(32):
                row[32 * j + i] = step * _F((np.int64(block[first + i]) >> shift) & 15) - low


@_compiled
def _q5_k(blocks: Any, halves: Any, values: Any) -> None:
    """As Q4_K, with 32 bytes of fifth bits before the levels: bit j of byte i is that of level 32 j + i."""
    for n in range(blocks.shape[0]):
        block, row = blocks[n], values[n]
        d, dmin = _half(halves, block, 0), _half(halves, block, 2)
        for j in range(8):
            scale, least = _six_bits(block, 4, j)
            step, low = d * _F(scale), dmin * _F(least)
            first, shift = 48 + (j // 2) * 32, 4 * (j % 2)
            for i in range(32):
                level = (np.int64(block[first + i]) >> shift) & 15
                high = (np.int64(block[16 + i]) >> j) & 1
                row[32 * j + i] = step * _F(level | (high << 4)) - low


@_compiled
def _q6_k(blocks: Any, halves: Any, values: Any) -> None:
    """128 bytes of lower bits, 64 of the upper two, sixteen signed scales and theirs; levels stand around 32."""
    for n in range(blocks.shape[0]):
        block, row = blocks[n], values[n]
        d = _half(halves, block, 208)
        for part in range(8):
            low, high = 64 * (part // 4) + 32 * (part % 2), 128 + 32 * (part // 4)
            shift, pair = 4 * ((part // 2) % 2), 2 * (part % 4)
            for half in range(2):
                step = d * _F(np.int8(block[192 + 2 * part + half]))
                for i in range(16 * half, 16 * half + 16):
                    upper = (np.int64(block[high + i]) >> pair) & 3
                    row[32 * part + i] = step * _F((((np.int64(block[low + i]) >> shift) & 15) | (upper << 4)) - 32)


_LOOPS: Final[dict[str, Callable[[Any, Any, Any], None]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
COMPILED_TYPES: Final = tuple(_LOOPS)
