"""KL divergence of next-token distributions without their logits in memory: the head goes by, some rows at a time.

T positions, D hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.weights import Tensors
from toolkit.reference.decoder import Array, head_rows


class _Normalizer:
    """log sum exp of logits that come a few columns at a time, [T]."""

    def __init__(self, positions: int) -> None:
        self._top = np.full(positions, -np.inf)
        self._sum = np.zeros(positions)

    def add(self, logits: Array) -> None:
        """Takes some more columns of every position into account, [T, a few]."""
        top = np.maximum(self._top, logits.max(axis=1))
        terms = np.exp(logits - top[:, None].astype(np.float32))
        self._sum = self._sum * np.exp(self._top - top) + terms.sum(axis=1, dtype=np.float64)
        self._top = top

    def value(self) -> NDArray[np.float64]:
        """Returns the logarithms over all columns that came so far, [T]."""
        return np.asarray(self._top + np.log(self._sum))


def mean_divergences(
    config: ModelConfig, source: Tensors, exact: Array, others: Mapping[str, Array], their_head: Tensors | None = None
) -> dict[str, float]:
    """Mean KLD(exact || other) over positions, for hidden states [T, D] after the final norm. The others have the same
    head unless another is given."""
    normalizer = _Normalizer(exact.shape[0])
    for rows in head_rows(config, source):
        normalizer.add(exact @ rows.T)
    log_sum = normalizer.value()
    normalizers = {name: _Normalizer(exact.shape[0]) for name in others}
    differences = {name: np.zeros(exact.shape[0]) for name in others}
    for rows, their_rows in zip(head_rows(config, source), head_rows(config, their_head or source), strict=True):
        logits = exact @ rows.T
        shares = np.exp(logits - log_sum[:, None].astype(np.float32))
        for name, hidden in others.items():
            theirs = hidden @ their_rows.T
            normalizers[name].add(theirs)
            differences[name] += np.einsum("tv,tv->t", shares, logits - theirs, dtype=np.float64)
    return {name: float(np.mean(differences[name] - log_sum + normalizers[name].value())) for name in others}
