"""KL divergence of next-token distributions without their logits in memory: the head goes by once, some rows at a
time.

With m the largest logit so far, sum exp(l - m) and sum exp(l - m) (l - t) over the rows seen, for the exact logits l
and others t, are all that KLD(l || t) needs besides both normalizers; a new largest logit scales them.
T positions, D hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.weights import Tensors
from toolkit.device.arrays import NUMPY, Device, device_of
from toolkit.reference.decoder import Array, head_rows


@dataclass(frozen=True)
class Diverging:
    """Hidden states [T, D] after the final norm, and what becomes of the head's rows [rows, D] before their product;
    None leaves them. Both are numpy's."""

    hidden: Array
    head: Callable[[Array], Array] | None = None


class _Normalizer:
    """log sum exp of logits that come a few columns at a time, [T]."""

    def __init__(self, positions: int) -> None:
        self._top = np.full(positions, -np.inf)
        self._sum = np.zeros(positions)

    def add(self, logits: Array) -> tuple[Array, NDArray[np.float64]]:
        """Counts [T, columns]; returns exp(logits - top) [T, columns] and what sums over earlier columns have to be
        multiplied by [T], now that the top is this one."""
        on = device_of(logits)
        top = np.maximum(self._top, on.to_host(on.largest(logits, 1)))
        terms = on.exp(logits - on.from_host(top[:, None].astype(np.float32)))
        shrunk = np.exp(self._top - top)
        self._sum = self._sum * shrunk + on.row_sums(terms)
        self._top = top
        return terms, shrunk

    def value(self) -> NDArray[np.float64]:
        """Returns the logarithms over all columns that came so far, [T]."""
        return np.asarray(self._top + np.log(self._sum))

    def mean(self, weighted: NDArray[np.float64]) -> NDArray[np.float64]:
        """A sum of terms times something, [T], as their mean under the distribution."""
        return np.asarray(weighted / self._sum)


def mean_divergences(
    config: ModelConfig, source: Tensors, exact: Array, others: Mapping[str, Diverging], on: Device = NUMPY
) -> dict[str, float]:
    """Mean KLD(exact || other) over positions, for hidden states [T, D] after the final norm. The head is read once,
    and its products are `on`'s."""
    own = _Normalizer(exact.shape[0])
    theirs = {name: _Normalizer(exact.shape[0]) for name in others}
    differences = {name: np.zeros(exact.shape[0]) for name in others}
    exact, moved = on.from_host(exact), {name: on.from_host(other.hidden) for name, other in others.items()}
    for rows in head_rows(config, source):
        head = on.from_host(rows)
        logits = on.product(exact, head.T)
        terms, shrunk = own.add(logits)
        for name, other in others.items():
            changed = on.product(moved[name], (head if other.head is None else on.from_host(other.head(rows))).T)
            theirs[name].add(changed)
            differences[name] = differences[name] * shrunk + on.row_dots(terms, logits - changed)
    return {name: float(np.mean(own.mean(differences[name]) - own.value() + theirs[name].value())) for name in others}
