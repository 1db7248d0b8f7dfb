"""Weights, inputs and the textbook quantities that GPTQ is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, dequantize_blocks
from toolkit.quant.gptq import DAMPING, Factor

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
ROWS, TOKENS = 24, 4096


def heavy_tailed_weight(width: int, seed: int = 0) -> Floats:
    """[ROWS, width], seeded, with outliers as trained weights have."""
    return np.random.default_rng(seed).standard_t(5, (ROWS, width)).astype(np.float32)


def correlated_input(width: int, seed: int = 1) -> Floats:
    """[TOKENS, width] of correlated channels of different size, as activations are."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((width // 4, width)) * np.exp(rng.standard_normal(width))
    return (rng.standard_normal((TOKENS, width // 4)) @ mixing + 0.3 * rng.standard_normal((TOKENS, width))).astype(
        np.float32
    )


def second_moment(x: Floats) -> Floats:
    """[width, width], the mean over tokens of x x'."""
    return np.asarray(x.T @ x / np.float32(len(x)), np.float32)


def damped_moment(moment: Floats, factor: Factor, tokens: float = np.inf) -> Doubles:
    """H [Kp, Kp] as the factor is to take it, a mean over `tokens`: padding and silent channels stand alone."""
    K = moment.shape[0]
    wide = np.zeros((factor.visits.order.size, factor.visits.order.size))
    wide[:K, :K] = moment
    diagonal = np.diagonal(wide).copy()
    wide *= 1 / (1 + K / tokens)
    mean = diagonal[:K].mean()
    np.fill_diagonal(wide, diagonal + np.where(diagonal <= 0, mean, DAMPING * mean))
    return wide


def restored_weight(blocks: QuantizedBlocks, spec: QuantSpec, width: int) -> Doubles:
    """[ROWS, width], the values that the blocks stand for."""
    return dequantize_blocks(blocks, spec, width).astype(np.float64)


def output_error(weight: Floats, restored: Floats | Doubles, moment: Floats) -> float:
    """tr((W - Q) H (W - Q)'), the mean squared error of the output over tokens."""
    miss = weight - restored
    return float(np.sum((miss @ moment.astype(np.float64)) * miss))
