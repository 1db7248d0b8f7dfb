"""What calibration keeps of an input, sequence by sequence.

T tokens in all, K channels.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.device.arrays import NUMPY, Device, device_of
from toolkit.errors import NonFiniteError
from toolkit.quant.activations import InputSample

Floats = NDArray[np.float32]
_SAMPLE: Final = 256
# Rows gathered before a product: one of few rows would spend its time on reading and writing K x K.
_BATCH: Final = 2048


class InputStatistics:
    """Second moment and range of each channel, and tokens evenly spaced over the text, unless it is `sampled` False."""

    def __init__(self, name: str, width: int, tokens: int, *, sampled: bool = True) -> None:
        self._name, self._every = name, max(1, tokens // _SAMPLE)
        self._squares = np.zeros(width, np.float64)
        self._low, self._high = np.zeros(width, np.float32), np.zeros(width, np.float32)
        self._kept: list[Floats] = []
        self._sampled, self.seen = sampled, 0

    def add(self, x: Floats) -> Floats:
        """Counts [T, K] of one sequence; returns it. Raises NonFiniteError for NaN or infinity."""
        on = device_of(x)
        squares = on.column_squares_in_double(x)
        if not np.isfinite(squares).all():
            bad = int(squares.size - np.count_nonzero(np.isfinite(squares)))
            raise NonFiniteError(
                f"the input of {self._name} is NaN or infinite in {bad} of {squares.size} channels on the calibration "
                "text: the checkpoint does not compute in float32, or is damaged"
            )
        self._squares += squares
        np.minimum(self._low, on.to_host(on.smallest(x, 0)), out=self._low)
        np.maximum(self._high, on.to_host(on.largest(x, 0)), out=self._high)
        if self._sampled:
            self._kept.append(on.to_host(x[-self.seen % self._every :: self._every]).copy())
        self.seen += x.shape[0]
        return x

    @staticmethod
    def sampled(tokens: int) -> int:
        """How many of a text's tokens a sample has, about."""
        return tokens // max(1, tokens // _SAMPLE)

    def sample(self, on: Device = NUMPY) -> InputSample:
        """What was seen, its tokens on a device; zero counts as seen in every channel."""
        tokens = np.concatenate(self._kept) if self._kept else np.empty((0, self._low.size), np.float32)
        moments = (self._squares / max(self.seen, 1)).astype(np.float32)
        return InputSample(on.from_host(tokens), moments, self._low, self._high)


class Products:
    """X~'X~ / T of what arrives, X~, and W X'X~ / T of it and the exact input X: with the rows W [N, K] given, or, as
    suits more of them than there are channels, X'X~ / T alone."""

    def __init__(self, width: int, rows: Floats | None = None, on: Device = NUMPY) -> None:
        self._rows, self._on = rows, on
        self._moment = on.zeros((width, width))
        self._cross = on.zeros((width if rows is None else rows.shape[0], width))
        self._waiting: list[tuple[Floats, Floats]] = []
        self._waiting_tokens = self.tokens = 0

    def add(self, exact: Floats, arriving: Floats) -> None:
        """Counts one sequence, [T, K] each."""
        self._waiting.append((exact, arriving))
        self._waiting_tokens += arriving.shape[0]
        self.tokens += arriving.shape[0]
        if self._waiting_tokens >= _BATCH:
            self._flush()

    def result(self) -> tuple[Floats, Floats]:
        """Both means, [K, K] and [N or K, K]; nothing can be added afterwards."""
        if self._waiting:
            self._flush()
        self._moment /= self.tokens
        self._cross /= self.tokens
        return self._moment, self._cross

    def _flush(self) -> None:
        on = self._on
        exact, arriving = (on.concatenate(side) for side in zip(*self._waiting, strict=True))
        self._waiting, self._waiting_tokens = [], 0
        self._moment += on.square(arriving)
        self._cross += on.product((exact if self._rows is None else on.product(exact, self._rows.T)).T, arriving)
