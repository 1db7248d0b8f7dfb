"""Activations of many sequences in a file, so that memory does not grow with the text: written once from a device, read
in order onto one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit.device.arrays import NUMPY, Device, device_of
from toolkit.files import replacing

Floats = NDArray[np.float32]


class Activations(Protocol):
    """[T, width] float32 of sequences, some at a time: written once, read in order, and removed."""

    def write(self, sequences: Iterable[Floats]) -> Activations:
        """Takes every sequence in order, one or several at a time; returns itself."""
        ...

    def __iter__(self) -> Iterator[tuple[Floats, tuple[int, ...]]]:
        """Each batch of sequences behind each other, and their lengths."""
        ...

    def remove(self) -> None:
        """Gives back the room that they take, whether they were written or not."""
        ...


class HeldActivations:
    """Activations that stay on the device whose work they are part of, in the batches they are written in."""

    def __init__(self, lengths: Sequence[tuple[int, ...]]) -> None:
        self._lengths, self._held = tuple(lengths), list[Floats]()

    def write(self, sequences: Iterable[Floats]) -> HeldActivations:
        """Takes every batch in order; returns itself."""
        self._held = list(sequences)
        return self

    def __iter__(self) -> Iterator[tuple[Floats, tuple[int, ...]]]:
        """Each batch of sequences behind each other, and their lengths."""
        start = 0
        whole = self._held[0] if len(self._held) == 1 else None
        for k, lengths in enumerate(self._lengths):
            # Experts give back the whole text at once.
            stop = start + sum(lengths)
            yield (self._held[k] if whole is None else whole[start:stop]), lengths
            start = stop

    def remove(self) -> None:
        """Gives the memory that they take back to the device."""
        self._held = []


class ActivationFile:
    """[T, width] float32 of sequences, of which some at a time are read onto a device: `lengths` has those of each
    batch. A name that exists is whole: it is given after the last byte."""

    def __init__(self, path: Path, lengths: Sequence[tuple[int, ...]], width: int, on: Device = NUMPY) -> None:
        self.path, self._lengths, self._width, self._on = path, tuple(lengths), width, on

    def read_by(self, on: Device, lengths: Sequence[tuple[int, ...]]) -> ActivationFile:
        """The same file in other batches, read onto a device."""
        return ActivationFile(self.path, lengths, self._width, on)

    @property
    def tokens(self) -> int:
        """How many tokens all sequences have."""
        return sum(map(sum, self._lengths))

    def is_whole(self) -> bool:
        """Whether the file is there with every sequence."""
        return self.path.is_file() and self.path.stat().st_size == 4 * self.tokens * self._width

    def write(self, sequences: Iterable[Floats]) -> ActivationFile:
        """Takes every sequence in order, one or several at a time, from whatever device; returns itself."""
        with self.filling() as add:
            for x in sequences:
                add(x)
        return self

    @contextmanager
    def filling(self) -> Iterator[Callable[[Floats], Floats]]:
        """Gives a function that takes sequences in order, and returns them; the file is whole in the end."""
        with replacing(self.path) as fresh, fresh.open("wb") as file:

            def add(x: Floats) -> Floats:
                np.ascontiguousarray(device_of(x).to_host(x), np.float32).tofile(file)
                return x

            yield add

    def __iter__(self) -> Iterator[tuple[Floats, tuple[int, ...]]]:
        """Each batch of sequences behind each other, and their lengths."""
        with self.path.open("rb") as file:
            for lengths in self._lengths:
                values = np.fromfile(file, np.float32, sum(lengths) * self._width)
                yield self._on.from_host(values.reshape(-1, self._width)), lengths

    def remove(self) -> None:
        """Deletes the file, if it is there."""
        self.path.unlink(missing_ok=True)
