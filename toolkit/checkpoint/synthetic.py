"""Seeded random weights of a config's true shapes, made as they are read: for sizing, CI and benchmarks."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.scan import Rows
from toolkit.checkpoint.weights import Origin

# A prime, so that rows of any width start at ever new places of the table.
_TABLE_LENGTH: Final = 4_194_301
_STD: Final = 0.02


class SyntheticWeights:
    """A `WeightSource` without files: matrices and biases are Gaussian (std 0.02, rounded to bf16), gains are 1.

    Every tensor is a run through one table of random numbers from a place its name decides; that costs a copy, where
    drawing 15 billion numbers would take longer than quantizing them.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        decoder = decoder_of(config)
        self._shapes = decoder.tensors
        self._gains = {norm.weight for norm in decoder.norms}
        self._seed = seed

    def __getstate__(self) -> dict[str, object]:
        """What another process is sent: it makes the table anew."""
        return {name: value for name, value in vars(self).items() if name != "_table"}

    def names(self) -> list[str]:
        """Lists every tensor's name, the embedding first."""
        return list(self._shapes)

    def read(self, name: str) -> NDArray[np.float32]:
        """Makes a whole tensor in float32."""
        return self.read_rows(name, 0, self._shapes[name][0])

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of a tensor; the same whatever rows are asked for with them."""
        shape = (stop - start, *self._shapes[name][1:])
        if name in self._gains:
            return np.ones(shape, np.float32)
        width = int(np.prod(shape[1:]))
        first = (zlib.crc32(name.encode()) + start * width) % _TABLE_LENGTH
        values = np.empty(shape[0] * width, np.float32)
        done = 0
        while done < values.size:
            piece = self._table[first : first + values.size - done]
            values[done : done + piece.size] = piece
            done, first = done + piece.size, 0
        return values.reshape(shape)

    def scan(self, chunk_bytes: int) -> Iterator[Rows]:
        """Every row of every tensor, `chunk_bytes` at two bytes a weight."""
        for name, shape in self._shapes.items():
            step = max(1, chunk_bytes // (2 * int(np.prod(shape[1:]))))
            for start in range(0, shape[0], step):
                stop = min(shape[0], start + step)
                yield Rows(name, start, stop, None)

    def decode(self, rows: Rows, start: int, stop: int) -> NDArray[np.float32]:
        """Makes rows [start, stop) of a tensor in float32."""
        return self.read_rows(rows.name, start, stop)

    def identity(self) -> tuple[Origin, ...]:
        """The seed: shapes are in the recipe."""
        return (Origin("synthetic", seed=self._seed),)

    def digests(self) -> tuple[Origin, ...]:
        """As `identity`: there are no files to hash."""
        return self.identity()

    def bytes_read(self) -> int:
        """Always 0, since there are no files to read."""
        return 0

    @cached_property
    def _table(self) -> NDArray[np.float32]:
        values = np.random.default_rng(self._seed).standard_normal(_TABLE_LENGTH, np.float32) * np.float32(_STD)
        return np.asarray((values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))
