"""Two sets of logits on the same tokens, compared in llama.cpp's terms.

T positions, V vocab.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.report.sections import Divergence, Histogram

Logits = NDArray[np.float32]
# Positions are compared a few at a time: float64 copies of a 152k vocabulary are large.
_CHUNK_ELEMENTS: Final = 4 << 20
# log10 of KLD, a quarter of a decade a bin; what lies outside is counted in the outermost bins.
_HISTOGRAM_EDGES: Final = np.arange(-8, 1.01, 0.25)


class Comparison:
    """KLD(reference || bundle) at each position, top-1 agreement, and both perplexities, gathered by sequence."""

    def __init__(self) -> None:
        self._kld: list[NDArray[np.float64]] = []
        self._agree: list[NDArray[np.bool_]] = []
        self._losses: list[NDArray[np.float64]] = []
        self._reference_losses: list[NDArray[np.float64]] = []
        self._max_error = 0.0

    def add(self, expected: Logits, actual: Logits, ids: list[int]) -> None:
        """One sequence: logits [T, V] of the reference and of the bundle after each of its T tokens."""
        step = max(1, _CHUNK_ELEMENTS // expected.shape[1])
        for start in range(0, len(ids), step):
            self._add_chunk(expected[start : start + step], actual[start : start + step], ids[start + 1 :])

    def _add_chunk(self, expected: Logits, actual: Logits, following: list[int]) -> None:
        log_p, log_q = _log_softmax(expected), _log_softmax(actual)
        self._kld.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
        self._agree.append(expected.argmax(axis=-1) == actual.argmax(axis=-1))
        self._max_error = max(self._max_error, float(np.abs(expected - actual).max()))
        known = min(len(following), len(log_p))
        rows, targets = np.arange(known), np.asarray(following[:known], np.int64)
        self._losses.append(-log_q[rows, targets])
        self._reference_losses.append(-log_p[rows, targets])

    @property
    def tokens(self) -> int:
        """The number of positions that were compared, over all sequences."""
        return sum(kld.size for kld in self._kld)

    @property
    def reference_perplexity(self) -> float:
        """The perplexity of the reference's own distributions on the tokens."""
        return float(np.exp(np.concatenate(self._reference_losses).mean()))

    def figures(self) -> Divergence:
        """How far the bundle's distributions are from the reference's."""
        kld = np.concatenate(self._kld)
        counts, _ = np.histogram(
            np.log10(np.clip(kld, 10 ** _HISTOGRAM_EDGES[0], 10 ** _HISTOGRAM_EDGES[-1])), _HISTOGRAM_EDGES
        )
        return Divergence(
            max_abs_logit_error=self._max_error,
            mean_kld=float(kld.mean()),
            median_kld=float(np.median(kld)),
            p99_kld=float(np.quantile(kld, 0.99)),
            p999_kld=float(np.quantile(kld, 0.999)),
            top1_agreement=float(np.concatenate(self._agree).mean()),
            perplexity=float(np.exp(np.concatenate(self._losses).mean())),
            kld_histogram=Histogram(tuple(_HISTOGRAM_EDGES.tolist()), tuple(counts.tolist())),
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
