"""AWQ: channel scales that move salient input channels into the grid's better half, chosen by the error of the output.

A reader's columns are multiplied by s, whatever writes the input is divided by it (arXiv 2306.00978): rounding the
columns of a large channel then errs less, at the price of the others. s = m^alpha / w^beta, with m the root mean square
of a channel and w that of the columns that read it, on a grid; each candidate is quantized and judged by the squared
error of the output on a sample of the input, its rounding to int8 or uint16 included where the bundle rounds it.
Matrices are quantized on the host, the sample and its products are on a device.
T sampled tokens, K channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.device.arrays import device_of
from toolkit.machine import threads
from toolkit.quant.activations import InputSample, Rounding
from toolkit.quant.blockwise import QuantSpec, dequantize_blocks, quantize_blocks

Floats = NDArray[np.float32]
# A coarse grid first, then the steps around its best.
_ALPHAS: Final = (4, 8, 12, 16, 20)
_AROUND: Final = (-3, -2, -1, 1, 2, 3)
_STEP: Final = 0.05
_BETAS: Final = (0.0, 0.5, 1.0)
# Wider scales leave what float16 can hold of a norm's gain.
_LIMIT: Final = 256.0
_ROWS: Final = 256
# How many scales of an input are judged, leaving it alone included.
CANDIDATES: Final = 1 + len(_ALPHAS) * len(_BETAS) + len(_AROUND)
# Where matrices are solved, an input is folded only if these scales (alpha in steps, beta) leave at most this share of
# the loss: solving makes up for what less would gain. Trained models keep more of it, tiny-r1 less than a fifth, and on
# Qwen2.5-Coder-0.5B folding all that gained anything left the divergence as it was (LOG.md).
_FIRST: Final = (8, 0.5)
_PROMISING: Final = 0.5
FIRST_CANDIDATES: Final = 2


@dataclass(frozen=True)
class Reader:
    """Rows of one matrix that reads the input, numpy's, and how it is stored."""

    weight: Floats
    spec: QuantSpec


@dataclass(frozen=True)
class FoldChoice:
    """`scales` [K] float32, or None where nothing beats leaving the input alone. Losses are shares of the output's
    energy on the sample."""

    scales: Floats | None = None
    alpha: float = 0.0
    beta: float = 0.0
    plain_loss: float = 0.0
    loss: float = 0.0


def choose_scales(
    readers: Sequence[Reader], sample: InputSample, shared: NDArray[np.int64], rounding: Rounding, solved: bool = False
) -> FoldChoice:
    """The best scales for an input; channels of equal `shared` [K] get one scale. `solved` readers make up for most of
    what scales would gain, and are given some where much is to be gained."""
    readers = [Reader(thinned_rows(reader.weight), reader.spec) for reader in readers]
    on = device_of(sample.tokens)
    wanted = [sample.tokens @ on.from_host(reader.weight).T for reader in readers]
    energy = sum(on.square_sum(y) for y in wanted) or 1.0

    def loss_of(scales: Floats) -> float:
        lost = 0.0
        for reader, y in zip(readers, wanted, strict=True):
            lost += on.square_sum(_output(reader, sample, scales, rounding) - y)
        return lost / energy

    ones = np.ones(sample.moments.shape, np.float32)
    plain = loss_of(ones)
    m = np.sqrt(_pooled(sample.moments, shared))
    columns = sum((reader.weight.astype(np.float64) ** 2).mean(axis=0) for reader in readers)
    w = np.sqrt(_pooled(np.asarray(columns), shared))

    def judged(steps: Sequence[tuple[int, float]]) -> list[FoldChoice]:
        with ThreadPoolExecutor(threads()) as pool:
            tried = [(_bounded(m, w, _STEP * step, beta), _STEP * step, beta) for step, beta in steps]
            losses = pool.map(loss_of, [scales for scales, _, _ in tried])
            return [FoldChoice(*one, plain, loss) for one, loss in zip(tried, losses, strict=True)]

    if solved and judged([_FIRST])[0].loss > _PROMISING * plain:
        return FoldChoice(plain_loss=plain, loss=plain)
    coarse = [(step, beta) for beta in _BETAS for step in _ALPHAS]
    found = judged(coarse)
    step, beta = coarse[int(np.argmin([choice.loss for choice in found]))]
    found += judged([(step + more, beta) for more in _AROUND])
    best = min(found, key=lambda choice: choice.loss)
    return best if best.loss < plain else FoldChoice(plain_loss=plain, loss=plain)


def output_loss(reader: Reader, sample: InputSample, rounding: Rounding) -> float:
    """The squared error of a reader's output on the sample, as a share of the output's energy."""
    on, thin = device_of(sample.tokens), Reader(thinned_rows(reader.weight), reader.spec)
    y = sample.tokens @ on.from_host(thin.weight).T
    miss = _output(thin, sample, np.ones(sample.moments.shape, np.float32), rounding) - y
    return on.square_sum(miss) / (on.square_sum(y) or 1.0)


def _output(reader: Reader, sample: InputSample, scales: Floats, rounding: Rounding) -> Floats:
    scaled, arriving = np.asarray(reader.weight * scales, np.float32), sample.divided(scales)
    blocks = quantize_blocks(scaled, reader.spec, arriving.moments)
    x = arriving.rounded(rounding, reader.spec.block_size)
    y: Floats = x @ device_of(x).from_host(dequantize_blocks(blocks, reader.spec, scaled.shape[1])).T
    return y


def _bounded(m: NDArray[np.float64], w: NDArray[np.float64], alpha: float, beta: float) -> Floats:
    """m^alpha / w^beta about a geometric mean of 1; 1 for channels that are silent or unread."""
    heard = (m > 0) & (w > 0)
    logs = np.zeros(m.shape)
    logs[heard] = alpha * np.log(m[heard]) - beta * np.log(w[heard])
    if heard.any():
        logs[heard] -= logs[heard].mean()
    return np.asarray(np.exp(np.clip(logs, -np.log(_LIMIT), np.log(_LIMIT))), np.float32)


def _pooled(values: NDArray[np.floating], shared: NDArray[np.int64]) -> NDArray[np.float64]:
    """The mean over the channels that share a scale, at each of them."""
    sums = np.bincount(shared, weights=values.astype(np.float64))
    return np.asarray((sums / np.maximum(np.bincount(shared), 1))[shared])


def thinned_rows(weight: Floats) -> Floats:
    """Some hundreds of rows, evenly spaced: enough to judge an error by."""
    return weight[:: max(1, weight.shape[0] // _ROWS)]


def thinned_count(rows: int) -> int:
    """How many of so many rows `thinned_rows` leaves."""
    return -(-rows // max(1, rows // _ROWS))
