"""Some rows of a checkpoint tensor, from stored bytes to bytes of the data file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.scan import Rows
from toolkit.checkpoint.weights import WeightSource
from toolkit.errors import MachineError
from toolkit.graph.layout import Layout, Slot
from toolkit.quant.blockwise import QuantSpec, quantize_blocks

Array = NDArray[np.float32] | NDArray[np.uint8]
# Widened at a time: a megabyte of float32 stays in a core's cache until it is quantized.
_TILE_ELEMENTS: Final = 1 << 18


@dataclass(frozen=True)
class Packed:
    """What became of some rows: sums of squares of weights and of their errors, and the bytes written."""

    name: str
    rows: int
    signal: float
    noise: float
    nbytes: int


class RowPacker:
    """Widens, quantizes and writes rows at their place; `pack` may be called from many threads."""

    def __init__(self, source: WeightSource, layout: Layout, file: BinaryIO, path: Path) -> None:
        self._source, self._file, self._path, self._lock = source, file, path, Lock()
        units = [(unit, k, name) for unit in layout.units.values() for k, name in enumerate(unit.sources)]
        # Where a tensor's first row stands in its unit, which may stack several.
        self._places = {name: (unit, sum(unit.rows[:k])) for unit, k, name in units}

    def pack(self, rows: Rows) -> Packed:
        """Raises NonFiniteError for NaN or infinity, MachineError if the disk is full."""
        unit, base = self._places[rows.name]
        step = max(1, _TILE_ELEMENTS // unit.width)
        parts: list[list[Array]] = []
        signal = noise = 0.0
        for start in range(rows.start, rows.stop, step):
            values = self._source.decode(rows, start, min(rows.stop, start + step))
            arrays, tile_noise = _arrays(values, unit.spec)
            parts.append(arrays)
            flat = values.reshape(-1)
            signal, noise = signal + float(np.vdot(flat, flat)), noise + tile_noise
        nbytes = 0
        for slot, tiles in zip(unit.slots, zip(*parts, strict=True), strict=True):
            array = np.concatenate(tiles)
            self._write(_row_offset(slot, base + rows.start), array)
            nbytes += array.nbytes
        return Packed(rows.name, rows.stop - rows.start, signal, noise, nbytes)

    def _write(self, offset: int, array: Array) -> None:
        try:
            left = array.data.cast("B")
            with self._lock:
                self._file.seek(offset)
                while left:
                    left = left[self._file.write(left) :]
        except OSError as problem:
            raise MachineError(
                f"{self._path} cannot be written: {problem.strerror}; free space and run again"
            ) from None


def _arrays(values: NDArray[np.float32], spec: QuantSpec | None) -> tuple[list[Array], float]:
    if spec is None:
        return [values], 0.0
    blocks = quantize_blocks(values, spec)
    arrays: list[Array] = [blocks.packed, blocks.scales]
    if blocks.zero_points is not None:
        arrays.append(blocks.zero_points)
    return arrays, blocks.noise


def _row_offset(slot: Slot, row: int) -> int:
    return slot.offset + row * (slot.nbytes // slot.shape[0])
