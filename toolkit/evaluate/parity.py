"""Two sets of logits on the same tokens, compared in llama.cpp's terms.

T positions, V vocab.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.machine import physical_cores
from toolkit.report.sections import Divergence, Histogram

Logits = NDArray[np.float32]
# Positions are compared as few at a time as stay in a core's cache: a float64 copy of one of 152k words is 1.2 MB.
_CHUNK_ELEMENTS: Final = 1 << 17
# log10 of KLD, a quarter of a decade a bin; what lies outside is counted in the outermost bins.
_HISTOGRAM_EDGES: Final = np.arange(-8, 1.01, 0.25)


@dataclass(frozen=True)
class _Compared:
    """Some positions of a sequence: KLD, whether both agree on the best token, both sides' loss where the next token is
    known, and the largest error of a logit."""

    kld: NDArray[np.float64]
    agree: NDArray[np.bool_]
    loss: NDArray[np.float64]
    reference_loss: NDArray[np.float64]
    max_error: float


class Comparison:
    """KLD(reference || bundle) at each position, top-1 agreement, and both perplexities, gathered by sequence."""

    def __init__(self) -> None:
        self._made: list[_Compared] = []

    def add(self, expected: Logits, actual: Logits, ids: list[int]) -> None:
        """One sequence: logits [T, V] of the reference and of the bundle after each of its T tokens."""
        step = max(1, _CHUNK_ELEMENTS // expected.shape[1])

        def chunk(start: int) -> _Compared:
            some = slice(start, start + step)
            return _compared(expected[some], actual[some], ids[start + 1 :])

        with ThreadPoolExecutor(physical_cores()) as pool:
            self._made += pool.map(chunk, range(0, len(ids), step))

    @property
    def tokens(self) -> int:
        """The number of positions that were compared, over all sequences."""
        return sum(made.kld.size for made in self._made)

    @property
    def reference_perplexity(self) -> float:
        """The perplexity of the reference's own distributions on the tokens."""
        return float(np.exp(np.concatenate([made.reference_loss for made in self._made]).mean()))

    def figures(self) -> Divergence:
        """How far the bundle's distributions are from the reference's."""
        kld = np.concatenate([made.kld for made in self._made])
        counts, _ = np.histogram(
            np.log10(np.clip(kld, 10 ** _HISTOGRAM_EDGES[0], 10 ** _HISTOGRAM_EDGES[-1])), _HISTOGRAM_EDGES
        )
        return Divergence(
            max_abs_logit_error=max(made.max_error for made in self._made),
            mean_kld=float(kld.mean()),
            median_kld=float(np.median(kld)),
            p99_kld=float(np.quantile(kld, 0.99)),
            p999_kld=float(np.quantile(kld, 0.999)),
            top1_agreement=float(np.concatenate([made.agree for made in self._made]).mean()),
            perplexity=float(np.exp(np.concatenate([made.loss for made in self._made]).mean())),
            kld_histogram=Histogram(tuple(_HISTOGRAM_EDGES.tolist()), tuple(counts.tolist())),
        )


def _compared(expected: Logits, actual: Logits, following: list[int]) -> _Compared:
    """Logits [T, V] of both sides, and the tokens that follow the first of their positions."""
    log_p, log_q = _log_softmax(expected), _log_softmax(actual)
    known = min(len(following), len(log_p))
    rows, targets = np.arange(known), np.asarray(following[:known], np.int64)
    return _Compared(
        kld=(np.exp(log_p) * (log_p - log_q)).sum(axis=-1),
        agree=expected.argmax(axis=-1) == actual.argmax(axis=-1),
        loss=-log_q[rows, targets],
        reference_loss=-log_p[rows, targets],
        max_error=float(np.abs(expected - actual).max()),
    )


def matching_prefix(expected: list[int], actual: list[int]) -> int:
    """How many tokens agree before the first that does not."""
    for count, (a, b) in enumerate(zip(expected, actual, strict=False)):
        if a != b:
            return count
    return min(len(expected), len(actual))


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))
