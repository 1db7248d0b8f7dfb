"""Two sets of logits on the same tokens, compared in llama.cpp's terms.

T positions, V vocab.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from toolkit.machine import physical_cores, threads
from toolkit.report.sections import Divergence, Histogram

Logits = NDArray[np.float32]
# Positions are compared as few at a time as stay in a core's cache.
_CHUNK_ELEMENTS: Final = 1 << 17
# Logits that differ by less everywhere have a KLD that float32 could not tell from its own rounding.
_NEAR: Final = 0.05
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

        with ThreadPoolExecutor(min(physical_cores(), threads())) as pool:
            self._made += pool.map(chunk, range(0, len(ids), step))

    def take(self, other: Comparison) -> None:
        """Counts what another one has compared, behind what this one has."""
        self._made += other._made

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
    """Logits [T, V] of both sides, and the tokens that follow the first of their positions.

    With D the difference of both normalizers, KLD is the mean of expected - actual under the reference less D. Where
    some logit differs by more than _NEAR it is taken in float32, which errs by some 1e-7; nearer, in float64.
    """
    difference = expected - actual
    error = float(max(difference.max(), -difference.min()))
    terms, normalizer = _exponentials(expected, np.float64 if error < _NEAR else np.float32)
    _, other = _exponentials(actual, terms.dtype.type)
    totals = terms.sum(axis=-1)
    means = np.array([np.dot(*row) for row in zip(terms, difference.astype(terms.dtype, copy=False), strict=True)])
    known = min(len(following), len(terms))
    rows, targets = np.arange(known), np.asarray(following[:known], np.int64)
    return _Compared(
        kld=(means / totals).astype(np.float64) - normalizer + other,
        agree=expected.argmax(axis=-1) == actual.argmax(axis=-1),
        loss=other[rows] - actual[rows, targets],
        reference_loss=normalizer[rows] - expected[rows, targets],
        max_error=error,
    )


def _exponentials(
    logits: Logits, dtype: type[np.floating[Any]]
) -> tuple[NDArray[np.floating[Any]], NDArray[np.float64]]:
    """e to the power of what each logit [T, V] is below the largest of its row, and the logarithm [T] of the sum of e
    to the power of each."""
    top = logits.max(axis=-1, keepdims=True)
    terms = logits.astype(dtype, copy=False) - top.astype(dtype, copy=False)
    np.exp(terms, out=terms)
    return terms, np.asarray(top[:, 0] + np.log(terms.sum(axis=-1).astype(np.float64)))


def matching_prefix(expected: list[int], actual: list[int]) -> int:
    """How many tokens agree before the first that does not."""
    for count, (a, b) in enumerate(zip(expected, actual, strict=False)):
        if a != b:
            return count
    return min(len(expected), len(actual))
