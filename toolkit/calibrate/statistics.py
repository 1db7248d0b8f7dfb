"""What calibration keeps of an input, sequence by sequence.

T tokens in all, K channels.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import NonFiniteError

Floats = NDArray[np.float32]
_SAMPLE: Final = 256
# Rows gathered before a product: one of few rows would spend its time on reading and writing K x K.
_BATCH: Final = 2048


class InputStatistics:
    """Second moments of each channel, and tokens evenly spaced over the text."""

    def __init__(self, name: str, width: int, tokens: int) -> None:
        self._name, self._every = name, max(1, tokens // _SAMPLE)
        self._squares = np.zeros(width, np.float64)
        self._kept: list[Floats] = []
        self._seen = 0

    def add(self, x: Floats) -> Floats:
        """Counts [T, K] of one sequence; returns it. Raises NonFiniteError for NaN or infinity."""
        squares = np.einsum("tk,tk->k", x, x, dtype=np.float64)
        if not np.isfinite(squares).all():
            bad = int(squares.size - np.count_nonzero(np.isfinite(squares)))
            raise NonFiniteError(
                f"the input of {self._name} is NaN or infinite in {bad} of {squares.size} channels on the calibration "
                "text: the checkpoint does not compute in float32, or is damaged"
            )
        self._squares += squares
        self._kept.append(x[-self._seen % self._every :: self._every].copy())
        self._seen += x.shape[0]
        return x

    def moments(self) -> Floats:
        """E[x^2] [K]."""
        return (self._squares / max(self._seen, 1)).astype(np.float32)

    def sample(self) -> Floats:
        """Some rows of the input [T', K]."""
        return np.concatenate(self._kept)


class Products:
    """X~'X~ / T, and X'X~ / T where the exact input X is given beside what arrives, X~."""

    def __init__(self, width: int, with_exact: bool) -> None:
        self._moment = np.zeros((width, width), np.float32)
        self._cross = np.zeros((width, width), np.float32) if with_exact else None
        self._waiting: list[tuple[Floats, Floats]] = []
        self._rows = self.tokens = 0

    def add(self, exact: Floats, arriving: Floats) -> None:
        """Counts one sequence, [T, K] each."""
        self._waiting.append((exact, arriving))
        self._rows += arriving.shape[0]
        self.tokens += arriving.shape[0]
        if self._rows >= _BATCH:
            self._flush()

    def result(self) -> tuple[Floats, Floats | None]:
        """Both means [K, K]; nothing can be added afterwards."""
        if self._waiting:
            self._flush()
        self._moment /= np.float32(self.tokens)
        if self._cross is not None:
            self._cross /= np.float32(self.tokens)
        return self._moment, self._cross

    def _flush(self) -> None:
        arriving = np.concatenate([pair[1] for pair in self._waiting])
        self._moment += arriving.T @ arriving
        if self._cross is not None:
            exact = np.concatenate([pair[0] for pair in self._waiting])
            self._cross += exact.T @ arriving
        self._waiting, self._rows = [], 0
