"""The inner loops for signed integers without a zero point: one positive scale a row, or one a block.

Where a row has several blocks its scales are whole sixteenths of the largest, which is all that QNN keeps of them
(LPBQ: a multiplier of 4 bits a block on a scale a channel). The multiplier is searched, not rounded: of a scale that
is free to be anything it would be the one above, and the block would lose what the search had won.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from toolkit.quant.kernel import compiled, compiled_for_reports, pack_levels, take_share, tree_sum

SIXTEENTHS: Final = 16
_F, _D = np.float32, np.float64
# Zeros below the first, as in quant/kernel.py; outside the others float32 does not hold what a search adds up.
_SMALLEST_SCALE: Final = np.float32(1e-36)
_SMALLEST_SEARCHED: Final = np.float32(1e-9)
_LARGEST_SEARCHED: Final = np.float32(1e9)
# Terms that are added in float32, side by side; sums of these in float64.
_PIECE: Final = 64


@compiled
def range_signed_scales(weight: Any, importance: Any, bits: int, block_size: int, scales: Any) -> None:
    """Fills scales [N, J] float32 from the range of each block of `weight` [N, K] float32, K being J whole blocks, or
    one that is not.
    `importance` is not looked at."""
    _choose(weight, importance, False, bits, block_size, scales)


@compiled
def searched_signed_scales(weight: Any, importance: Any, bits: int, block_size: int, scales: Any) -> None:
    """Fills scales [N, J] float32 by a search. `importance` [K] float32 weighs the errors of columns; without entries
    the search weighs by size."""
    _choose(weight, importance, True, bits, block_size, scales)


@compiled
def round_signed_rows(weight: Any, bits: int, block_size: int, scales: Any, packed: Any) -> float:
    """Rounds `weight` [N, K] by scales [N, J] that stand: fills packed [N, J, block_size*bits/8] uint8 with levels
    0 … 2^bits - 1 around 2^(bits-1), and returns the sum of squared errors."""
    half, noise = _F(1 << (bits - 1)), 0.0
    # Zeros where a row of one block is shorter than that.
    levels = np.full(block_size, np.uint8(1 << (bits - 1)), np.uint8)
    for row in range(weight.shape[0]):
        for j in range(scales.shape[1]):
            noise += _round(weight[row, j * block_size : (j + 1) * block_size], scales[row, j], half, levels)
            pack_levels(levels, bits, packed[row, j])
    return noise


@compiled
def round_signed_columns(columns: Any, upper: Any, scales: Any, bits: int, levels: Any, restored: Any) -> None:
    """GPTQ's inner loop with scales that stand: rounds `columns` [N, n] float32 from left to right, in place, by
    `scales` [N, n]: column k holds what is left of z_k, and a rounded column takes its share by `upper` [n, n] from
    those behind it (quant/gptq.py). Fills levels uint8 and restored float32 [N, n]."""
    half = _F(1 << (bits - 1))
    for row in range(columns.shape[0]):
        for i in range(columns.shape[1]):
            scale = scales[row, i]
            level = _level(columns[row, i] / upper[i, i], scale, half)
            value = level * scale
            take_share(columns[row, i + 1 :], value, upper[i, i + 1 :])
            levels[row, i], restored[row, i] = np.uint8(np.int32(level + half)), value


@compiled
def _choose(weight: Any, importance: Any, searches: bool, bits: int, block_size: int, scales: Any) -> None:
    """A scale a block, and where a row has several each a multiple of a sixteenth of the row's largest."""
    half = _F(1 << (bits - 1))
    width = 16
    while width < min(block_size, _PIECE):
        width *= 2
    terms, worth = np.zeros((2, width), np.float32), np.empty(block_size, np.float32)
    for row in range(weight.shape[0]):
        for j in range(scales.shape[1]):
            block = weight[row, j * block_size : (j + 1) * block_size]
            scale = _range(block, half)
            if searches and _SMALLEST_SEARCHED < scale < _LARGEST_SEARCHED:
                _weigh(block, importance, j * block_size, worth, terms)
                scale = _search(block, worth, scale, half, terms)
            scales[row, j] = scale
        if scales.shape[1] > 1:
            _snap(weight[row], importance, searches, block_size, half, worth, scales[row], terms)


@compiled
def _range(block: Any, half: Any) -> Any:
    """The least scale that clips nothing: levels reach from -half to half - 1."""
    low, high = _F(0), _F(0)
    for k in range(block.size):
        low = block[k] if block[k] < low else low
        high = block[k] if block[k] > high else high
    scale = max(high / (half - _F(1)), -low / half)
    return scale if scale > _SMALLEST_SCALE else _F(0)


@compiled
def _weigh(block: Any, importance: Any, first: int, worth: Any, terms: Any) -> None:
    """What an error of each column weighs: as given, or its size plus the block's root mean square."""
    if importance.size:
        for k in range(block.size):
            worth[k] = importance[first + k]
        return
    total, width = 0.0, terms.shape[1]
    for start in range(0, block.size, width):
        n = min(width, block.size - start)
        for k in range(n):
            terms[0, k] = block[start + k] * block[start + k]
        for k in range(n, width):
            terms[0, k] = _F(0)
        total += _D(tree_sum(terms[0]))
    rms = _F(np.sqrt(total / block.size))
    for k in range(block.size):
        worth[k] = abs(block[k]) + rms


@compiled
def _search(block: Any, worth: Any, start: Any, half: Any, terms: Any) -> Any:
    """Of scales from half of `start` up, each refitted to the levels it gives, the one with the least error."""
    best, scale = -1.0, start
    for step in range(10, 21):
        cross, square = _products(block, worth, start * _F(step) / _F(20), half, terms)
        if cross > 0 and cross * cross > best * square:
            best, scale = cross * cross / square, _F(cross / square)
    return scale


@compiled
def _products(block: Any, worth: Any, scale: Any, half: Any, terms: Any) -> Any:
    """Sums of worth * level * x and of worth * level^2, with the levels that a scale gives."""
    crosses, squares = terms[0], terms[1]
    inverse, bottom, top = _F(1) / scale, -half, half - _F(1)
    cross, square = 0.0, 0.0
    for start in range(0, block.size, crosses.size):
        n = min(crosses.size, block.size - start)
        x, weighs = block[start : start + n], worth[start : start + n]
        for k in range(n):
            level = _near(x[k], inverse, bottom, top)
            weighted = weighs[k] * level
            crosses[k] = weighted * x[k]
            squares[k] = weighted * level
        for k in range(n, crosses.size):
            crosses[k], squares[k] = _F(0), _F(0)
        cross += _D(tree_sum(crosses))
        square += _D(tree_sum(squares))
    return cross, square


@compiled
def _snap(
    row: Any, importance: Any, searches: bool, block_size: int, half: Any, worth: Any, scales: Any, terms: Any
) -> None:
    """Each scale of a row to a multiple 1 … 16 of a sixteenth of the largest: of those around it the best, the one
    above where nothing is searched."""
    largest = _F(0)
    for j in range(scales.size):
        largest = max(largest, scales[j])
    unit = largest / _F(SIXTEENTHS)
    finds = searches and bool(_SMALLEST_SEARCHED < largest < _LARGEST_SEARCHED)
    for j in range(scales.size):
        if unit <= _SMALLEST_SCALE:
            scales[j] = _F(0)
            continue
        above = min(max(int(np.ceil(scales[j] / unit - _F(1e-4))), 1), SIXTEENTHS)
        chosen = above
        # The largest stays what it is: the others are counted in its sixteenths.
        if finds and scales[j] < largest:
            block = row[j * block_size : (j + 1) * block_size]
            _weigh(block, importance, j * block_size, worth, terms)
            least = -1.0
            for multiplier in range(max(above - 2, 1), min(above + 1, SIXTEENTHS) + 1):
                error = _error(block, worth, unit * _F(multiplier), half, terms[0])
                if least < 0 or error < least:
                    least, chosen = error, multiplier
        scales[j] = unit * _F(chosen)


@compiled
def _error(block: Any, worth: Any, scale: Any, half: Any, terms: Any) -> Any:
    """The weighted squared error of a block rounded by a scale."""
    inverse, bottom, top, total = _F(1) / scale, -half, half - _F(1), 0.0
    for start in range(0, block.size, terms.size):
        n = min(terms.size, block.size - start)
        x, weighs = block[start : start + n], worth[start : start + n]
        for k in range(n):
            level = _near(x[k], inverse, bottom, top)
            miss = x[k] - level * scale
            terms[k] = weighs[k] * miss * miss
        for k in range(n, terms.size):
            terms[k] = _F(0)
        total += _D(tree_sum(terms))
    return total


@compiled
def _near(x: Any, inverse: Any, bottom: Any, top: Any) -> Any:
    """The level nearest to x times the inverse of a scale: what a search may use, a product being faster."""
    level = np.rint(x * inverse)
    level = bottom if level < bottom else level
    return top if level > top else level


@compiled
def _level(x: Any, scale: Any, half: Any) -> Any:
    if scale <= _F(0):
        return _F(0)
    level = np.rint(x / scale)
    return min(max(level, -half), half - _F(1))


@compiled_for_reports
def _round(block: Any, scale: Any, half: Any, levels: Any) -> Any:
    """Fills `levels` with the integers 0 … 2^bits - 1; returns the squared error."""
    error, bottom, top = 0.0, -half, half - _F(1)
    for k in range(block.size):
        level = np.rint(block[k] / scale) if scale > _F(0) else _F(0)
        level = bottom if level < bottom else level
        level = top if level > top else level
        miss = block[k] - level * scale
        error += _D(miss) * _D(miss)
        levels[k] = np.uint8(np.int32(level + half))
    return error
