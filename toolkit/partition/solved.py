"""Matrices that were solved before the streaming pass: written at once at their places, and named in the journal."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from toolkit.partition.data_files import DataFile, Destination, open_data_files
from toolkit.partition.pack import TensorError
from toolkit.partition.rows import RowWriter, arrays_of
from toolkit.quant.blockwise import QuantizedBlocks

Floats = NDArray[np.float32]


class SolvedWriter:
    """Takes solved rows; `commit` makes the journal name their tensors, which the streaming pass then leaves alone.

    `resumed` says whether the rows that an earlier run committed are there."""

    def __init__(self, destination: Destination, files: Sequence[DataFile], resumed: bool) -> None:
        self.resumed = resumed
        self._destination, self._files = destination, files
        self._rows = RowWriter(files)
        self._sums: dict[str, tuple[float, float]] = {}

    def write(self, tensor: str, start: int, signal: float, blocks: QuantizedBlocks) -> None:
        """Rows [start, …) of a tensor, the sum of squares of what they were, and as they are stored. Raises as
        `RowWriter.write`."""
        found = self._rows.unit_rows[tensor]
        for into in found:
            self._rows.write(tensor, start, into, arrays_of(blocks))
        so_far, noise = self._sums.get(tensor, (0.0, 0.0))
        self._sums[tensor] = (so_far + signal, noise + blocks.noise)

    def write_floats(self, tensor: str, values: Floats) -> None:
        """A whole tensor of floats. Raises as `RowWriter.write`."""
        for into in self._rows.unit_rows[tensor]:
            self._rows.write(tensor, 0, into, [values])
        self._sums[tensor] = (float(np.vdot(values, values)), 0.0)

    def commit(self) -> None:
        """Syncs the data, then names the tensors written since."""
        for file in self._files:
            os.fsync(file.handle.fileno())
        with self._destination.journal.open("a", encoding="utf-8") as log:
            for tensor, (signal, noise) in self._sums.items():
                log.write(json.dumps(asdict(TensorError(tensor, signal, noise))) + "\n")
            log.flush()
            os.fsync(log.fileno())
        self._sums = {}


@contextmanager
def open_solved(destination: Destination) -> Iterator[SolvedWriter]:
    """Opens a writer into a bundle's data files, which it makes in full size where they are not there yet."""
    resumed = destination.is_begun()
    with open_data_files([destination], resumed) as files:
        yield SolvedWriter(destination, files, resumed)
