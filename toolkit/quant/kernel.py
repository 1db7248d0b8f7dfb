"""The inner loops of quantizing, compiled: one block after the other, without the interpreter and its lock.

A row of toolkit/algorithms.py names the function here that chooses its scales; `round_rows` rounds by them.

numpy needs some twenty passes for what is one here: 1.0 ns a weight against 2.3 for round to nearest (LOG.md).
Slices are filled by loops: an assignment to one takes numba ten seconds more, all for the words of an error.
Sums are taken in the order written: letting the compiler reorder them makes the search twice as fast, and its last bit
a matter of the processor, and even of whether the code came from numba's cache.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from toolkit.jit import CompilerOptions, machine_code

_F = np.float32
# Below the first, 1/scale nears what float32 can hold and a block counts as zeros; below the second, the search's
# products leave its range and the plain scale stays.
SMALLEST_SCALE: Final = np.float32(1e-36)
SMALLEST_SEARCHED: Final = np.float32(1e-9)
# Weights are finite by the time they come here, and the sign of a zero means nothing.
_OPTIONS: Final[CompilerOptions] = {"nogil": True, "error_model": "numpy", "fastmath": {"nnan", "ninf", "nsz"}}


def compiled(function: Any, options: CompilerOptions = _OPTIONS) -> Any:
    """`function` as machine code; without numba it raises MachineError when it is called."""
    return machine_code(function, options, "quantizing")


def compiled_for_reports(function: Any) -> Any:
    """Sums in any order: for what is reported, never for what is stored."""
    return compiled(function, {**_OPTIONS, "fastmath": _OPTIONS["fastmath"] | {"reassoc"}})


def compiled_into_callers(function: Any) -> Any:
    """`function` as machine code that is written into its callers: a call counts references to arrays, which takes
    longer than a few lines do."""
    return compiled(function, {**_OPTIONS, "inline": "always"})


@compiled
def range_scales(
    weight: Any, importance: Any, bits: int, symmetric: bool, block_size: int, scales: Any, zeros: Any
) -> None:
    """Fills scales [N, J] float32 and zeros [N, J] uint8 from the range of each block of `weight` [N, K] float32.

    What a row lacks of its last block counts as zeros. `importance` is not looked at.
    """
    top = _F((1 << bits) - 1)
    block = np.empty(block_size, np.float32)
    for row in range(weight.shape[0]):
        for j in range(scales.shape[1]):
            take_block(weight[row], j, block)
            scales[row, j], zero = range_scale(block, top, symmetric)
            zeros[row, j] = np.uint8(zero)


@compiled
def searched_scales(
    weight: Any, importance: Any, bits: int, symmetric: bool, block_size: int, scales: Any, zeros: Any
) -> None:
    """Fills the same by the search of quant/blockwise.py. `importance` [K] float32 says how much an error of each
    column weighs; without entries the search weighs by size."""
    top = _F((1 << bits) - 1)
    block, worth = np.empty(block_size, np.float32), np.zeros(block_size, np.float32)
    crosses, squares = np.empty(block_size, np.float32), np.empty(block_size, np.float32)
    for row in range(weight.shape[0]):
        for j in range(scales.shape[1]):
            take_block(weight[row], j, block)
            scale, zero = range_scale(block, top, symmetric)
            if abs(scale) > SMALLEST_SEARCHED:
                if importance.size:
                    _given_worth(importance[j * block_size : (j + 1) * block_size], worth)
                else:
                    _worth_by_size(block, worth, squares)
                scale, zero = _search_scale(block, worth, scale, zero, top, symmetric, crosses, squares)
            scales[row, j], zeros[row, j] = scale, np.uint8(zero)


@compiled
def round_rows(weight: Any, bits: int, block_size: int, scales: Any, zeros: Any, packed: Any) -> float:
    """Rounds `weight` [N, K] by scales and zeros [N, J] that stand: fills packed [N, J, block_size*bits/8] uint8 and
    returns the sum of squared errors."""
    top = _F((1 << bits) - 1)
    block, levels = np.empty(block_size, np.float32), np.empty(block_size, np.uint8)
    noise = 0.0
    for row in range(weight.shape[0]):
        for j in range(scales.shape[1]):
            take_block(weight[row], j, block)
            noise += _round(block, scales[row, j], _F(zeros[row, j]), top, levels)
            pack_levels(levels, bits, packed[row, j])
    return noise


@compiled
def shorten(scales: Any) -> None:
    """Rounds scales [N, J] float32 to the nearest bfloat16, in place."""
    for row in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            scales[row, j] = nearest_bfloat16(scales[row, j])


@compiled
def nearest_bfloat16(scale: Any) -> Any:
    """The nearest float32 whose lower 16 bits are zero, half to even. Scales are finite, and far from the largest."""
    bits = np.float32(scale).view(np.uint32)
    bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint32(bits & np.uint32(0xFFFF0000)).view(np.float32)


@compiled
def take_block(row: Any, j: int, block: Any) -> None:
    """Copies the `j`-th block of a row into `block`, with zeros for what the row lacks."""
    piece = row[j * block.size : (j + 1) * block.size]
    for k in range(piece.size):
        block[k] = piece[k]
    for k in range(piece.size, block.size):
        block[k] = _F(0)


@compiled
def gptq_columns(
    columns: Any,
    upper: Any,
    worth: Any,
    bits: int,
    symmetric: bool,
    block_size: int,
    short_scales: bool,
    levels: Any,
    restored: Any,
    scales: Any,
    zeros: Any,
) -> None:
    """Rounds `columns` [N, n] float32 from left to right, in place: column k holds what is left of z_k, and a rounded
    column takes its share by `upper` [n, n] from those behind it (quant/gptq.py). Fills levels uint8 and restored
    float32 [N, n], scales, which are bfloat16 where `short_scales`, and zeros [N, n / block_size]."""
    top = _F((1 << bits) - 1)
    block, left = np.empty(block_size, np.float32), np.empty(block_size, np.float32)
    crosses, squares = np.empty(block_size, np.float32), np.empty(block_size, np.float32)
    for row in range(columns.shape[0]):
        for j in range(scales.shape[1]):
            first = j * block_size
            _unrounded_block(columns[row, first : first + block_size], upper, first, left, block)
            scale, zero = range_scale(block, top, symmetric)
            if abs(scale) > SMALLEST_SEARCHED:
                scale, zero = _search_scale(
                    block, worth[first : first + block_size], scale, zero, top, symmetric, crosses, squares
                )
            if short_scales:
                scale = nearest_bfloat16(scale)
            inverse = _inverse(scale)
            for i in range(first, first + block_size):
                level = np.rint(columns[row, i] / upper[i, i] * inverse) + zero
                level = _F(0) if level < _F(0) else level
                level = top if level > top else level
                value = (level - zero) * scale
                take_share(columns[row, i + 1 :], value, upper[i, i + 1 :])
                levels[row, i], restored[row, i] = np.uint8(np.int32(level)), value
            scales[row, j], zeros[row, j] = scale, np.uint8(zero)


@compiled_into_callers
def take_share(left: Any, value: Any, share: Any) -> None:
    """Takes `value` times `share` [n] from `left` [n]. Over slices that begin where the columns do the loop is one of
    vectors; with an index that starts elsewhere numba looks at every sign first, three times as long."""
    for k in range(left.size):
        left[k] -= value * share[k]


@compiled
def _unrounded_block(columns: Any, upper: Any, first: int, left: Any, block: Any) -> None:
    """Fills `block` with the columns of a block as the errors before it left them, none of its own rounded yet."""
    for k in range(block.size):
        left[k] = columns[k]
    for i in range(block.size):
        block[i] = left[i] / upper[first + i, first + i]
        take_share(left[i + 1 :], block[i], upper[first + i, first + i + 1 : first + block.size])


@compiled
def range_scale(block: Any, top: Any, symmetric: bool) -> Any:
    """(scale, zero) from the range of a block, 0 forced into it, so that zeros and padding are exact.

    Symmetric uses the full range: the value of largest magnitude becomes -2^(bits-1) (llama.cpp's Q4_0, MLAS's
    default). Asymmetric spans smallest to largest in 2^bits - 1 steps.
    """
    low, high = _F(0), _F(0)
    for k in range(block.size):
        x = block[k]
        low = x if x < low else low
        high = x if x > high else high
    if symmetric:
        half = (top + _F(1)) / _F(2)
        scale = (low if -low > high else high) / -half
        return scale if abs(scale) > SMALLEST_SCALE else _F(0), half
    scale = (high - low) / top
    scale = scale if scale > SMALLEST_SCALE else _F(0)
    return scale, _zero_point(low, scale, top)


@compiled
def _zero_point(low: Any, scale: Any, top: Any) -> Any:
    zero = np.rint(-low * _inverse(scale))
    return min(max(zero, _F(0)), top)


@compiled
def _inverse(scale: Any) -> Any:
    return _F(1) / scale if scale != _F(0) else _F(0)


@compiled
def _worth_by_size(block: Any, worth: Any, squares: Any) -> None:
    """What an error weighs without data: the block's root mean square plus the weight's own size."""
    for k in range(block.size):
        squares[k] = block[k] * block[k]
    rms = np.sqrt(tree_sum(squares) / _F(block.size))
    for k in range(block.size):
        worth[k] = abs(block[k]) + rms


@compiled
def _given_worth(importance: Any, worth: Any) -> None:
    for k in range(importance.size):
        worth[k] = importance[k]
    for k in range(importance.size, worth.size):
        worth[k] = _F(0)


@compiled
def _search_scale(
    block: Any, worth: Any, start: Any, start_zero: Any, top: Any, symmetric: bool, crosses: Any, squares: Any
) -> Any:
    """The k-quant search: a grid of ranges, each scale refitted, the best kept (quant/blockwise.py)."""
    low = _F(0)
    for k in range(block.size):
        x = block[k]
        low = x if x < low else low
    steps = (top + _F(1)) / _F(2) if symmetric else top
    best, scale, zero = _F(-1), start, start_zero
    for tenths in range(-9, 10, 3):
        candidate = start * (steps / (steps + _F(tenths) / _F(10)))
        candidate_zero = start_zero if symmetric else _zero_point(low, candidate, top)
        inverse, bottom, ceiling = _inverse(candidate), -candidate_zero, top - candidate_zero
        for k in range(block.size):
            x = block[k]
            level = np.rint(x * inverse)
            level = bottom if level < bottom else level
            level = ceiling if level > ceiling else level
            weighted = worth[k] * level
            crosses[k] = weighted * x
            squares[k] = weighted * level
        cross, square = tree_sum(crosses), tree_sum(squares)
        fit = cross / square if square != _F(0) else _F(0)
        if cross * fit > best:
            best, scale, zero = cross * fit, fit, candidate_zero
    return scale, zero


@compiled
def tree_sum(terms: Any) -> Any:
    """Halves added to each other, in place, down to eight: an order the processor can run side by side, and always the
    same. The length is a power of two from 16 on, as every block size is."""
    half = terms.size // 2
    while half >= 8:
        for k in range(half):
            terms[k] += terms[k + half]
        half //= 2
    low = (terms[0] + terms[1]) + (terms[2] + terms[3])
    return low + ((terms[4] + terms[5]) + (terms[6] + terms[7]))


@compiled_for_reports
def _round(block: Any, scale: Any, zero: Any, top: Any, levels: Any) -> Any:
    """Fills `levels` with the integers 0 … 2^bits - 1, half to even, then clipped; returns the squared error."""
    inverse, error = _inverse(scale), _F(0)
    for k in range(block.size):
        level = np.rint(block[k] * inverse) + zero
        level = _F(0) if level < _F(0) else level
        level = top if level > top else level
        miss = (level - zero) * scale - block[k]
        error += miss * miss
        levels[k] = np.uint8(np.int32(level))
    return error


@compiled
def pack_levels(levels: Any, bits: int, packed: Any) -> None:
    """Fills `packed` with levels of one block. 4 bits: two levels a byte, the even one in the low nibble."""
    if bits == 8:
        for k in range(packed.size):
            packed[k] = levels[k]
    else:
        for k in range(packed.size):
            packed[k] = levels[2 * k] | (levels[2 * k + 1] << np.uint8(4))
