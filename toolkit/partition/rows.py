"""Some rows of a checkpoint tensor, from stored bytes to bytes of the data files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.scan import Rows
from toolkit.checkpoint.weights import WeightSource
from toolkit.errors import UnsupportedError
from toolkit.graph.layout import Slot, Unit
from toolkit.partition.data_files import DataFile
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, quantize_blocks, signed_integers

Array = NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16] | NDArray[np.uint8]
# Widened at a time: a megabyte of float32 stays in a core's cache until it is quantized.
_TILE_ELEMENTS: Final = 1 << 18
# Columns of a matrix turned at a time: an even number, so that each time whole bytes come out.
_TURNED: Final = 256


@dataclass(frozen=True)
class Packed:
    """What became of some rows: sums of squares of weights and, by format, of their errors; the bytes written."""

    name: str
    rows: int
    signal: float
    noise: dict[QuantSpec | None, float]
    nbytes: int


# A file, a unit in it that may stack several tensors, and the unit's rows where a tensor's belong.
UnitRows = tuple[DataFile, Unit, slice]


def unit_rows(files: Sequence[DataFile]) -> dict[str, list[UnitRows]]:
    """Returns where the rows of each tensor go: the file, the unit, and the unit's rows that are the tensor's."""
    found: dict[str, list[UnitRows]] = defaultdict(list)
    for file in files:
        for unit in file.units:
            for name, place in unit.places().items():
                found[name].append((file, unit, place))
    return found


class RowWriter:
    """Puts quantized rows at their places. A signed matrix lies there turned, rows as columns, so it is gathered whole
    first: a few are in memory at a time."""

    def __init__(self, files: Sequence[DataFile]) -> None:
        self.unit_rows = unit_rows(files)
        self._gathered: dict[tuple[int, str], list[tuple[int, Sequence[Array]]]] = defaultdict(list)
        self._lock = Lock()

    def write(self, name: str, start: int, into: UnitRows, arrays: Sequence[Array]) -> int:
        """What became of rows [start, …) of a tensor, one array for each slot; returns the bytes written.

        Raises UnsupportedError for what float16 cannot hold, MachineError if the disk is full.
        """
        file, unit, place = into
        if unit.spec is not None and unit.spec.signed:
            whole = self._gather(file, unit, place.start + start, arrays)
            if whole is None:
                return 0
            return self._write_turned(name, file, unit, *whole)
        nbytes = 0
        for slot, array in zip(unit.slots, arrays, strict=True):
            stored = _narrowed(array, slot, name)
            each = slot.nbytes // slot.shape[0]
            first = slot.offset + (place.start + start * place.step) * each
            file.write_rows(first, stored.view(np.uint8).reshape(-1, each), place.step * each)
            nbytes += stored.nbytes
        return nbytes

    def _write_turned(
        self, name: str, file: DataFile, unit: Unit, packed: NDArray[np.uint8], scales: NDArray[np.float32]
    ) -> int:
        """A whole signed matrix, some of its columns at a time; its zero points are zeros."""
        integers, scale, zero_point = unit.slots
        assert unit.spec is not None
        bits, rows = unit.spec.bits, packed.reshape(packed.shape[0], -1)
        step = _TURNED * bits // 8
        for start in range(0, rows.shape[1], step):
            turned = signed_integers(rows[:, start : start + step], bits)
            # The last column of an odd number is not stored.
            turned = turned[: integers.nbytes - start * rows.shape[0]]
            file.write(integers.offset + start * rows.shape[0], turned.data.cast("B"))
        stored = _narrowed(np.ascontiguousarray(scales.T), scale, name)
        file.write(scale.offset, stored.data.cast("B"))
        file.write(zero_point.offset, np.zeros(zero_point.nbytes, np.uint8).data.cast("B"))
        return sum(slot.nbytes for slot in unit.slots)

    def _gather(self, file: DataFile, unit: Unit, start: int, arrays: Sequence[Array]) -> list[Any] | None:
        """Packed levels and scales of the whole unit, once its last rows are here."""
        key = id(file), unit.name
        with self._lock:
            pieces = self._gathered[key]
            pieces.append((start, arrays))
            if sum(piece[0].shape[0] for _, piece in pieces) < sum(unit.rows):
                return None
            del self._gathered[key]
        pieces.sort(key=lambda piece: piece[0])
        return [np.concatenate([piece[k] for _, piece in pieces]) for k in (0, 1)]


class RowPacker:
    """Widens, quantizes once for each format, and writes rows at their places; `pack` runs in many threads.

    `importance` [K] by tensor weighs the errors of its columns.
    """

    def __init__(
        self, source: WeightSource, files: Sequence[DataFile], importance: Mapping[str, NDArray[np.float32]]
    ) -> None:
        self._source, self._importance = source, importance
        self._writer = RowWriter(files)

    def pack(self, rows: Rows) -> Packed:
        """Raises NonFiniteError for NaN or infinity, UnsupportedError for what float16 cannot hold, MachineError if
        the disk is full."""
        found = self._writer.unit_rows[rows.name]
        step = max(1, _TILE_ELEMENTS // found[0][1].width)
        parts: dict[QuantSpec | None, list[list[Array]]] = defaultdict(list)
        noise: dict[QuantSpec | None, float] = defaultdict(float)
        signal = 0.0
        for start in range(rows.start, rows.stop, step):
            values = self._source.decode(rows, start, min(rows.stop, start + step))
            for spec in {unit.spec for _, unit, _ in found}:
                arrays, tile_noise = _arrays(values, spec, self._importance.get(rows.name))
                parts[spec].append(arrays)
                noise[spec] += tile_noise
            flat = values.reshape(-1)
            signal += float(np.vdot(flat, flat))
        joined = {spec: [np.concatenate(tiles) for tiles in zip(*kept, strict=True)] for spec, kept in parts.items()}
        nbytes = sum(self._writer.write(rows.name, rows.start, into, joined[into[1].spec]) for into in found)
        return Packed(rows.name, rows.stop - rows.start, signal, dict(noise), nbytes)


def _arrays(
    values: NDArray[np.float32], spec: QuantSpec | None, importance: NDArray[np.float32] | None
) -> tuple[list[Array], float]:
    if spec is None:
        return [values], 0.0
    blocks = quantize_blocks(values, spec, importance)
    return arrays_of(blocks), blocks.noise


def arrays_of(blocks: QuantizedBlocks) -> list[Array]:
    """One for each slot of a quantized unit."""
    zeros: list[Array] = [] if blocks.zero_points is None else [blocks.zero_points]
    return [blocks.packed, blocks.scales, *zeros]


def _narrowed(array: Array, slot: Slot, name: str) -> Array:
    if slot.dtype == "bfloat16":
        # Rounded before the integers were: the lower half is zeros.
        return (array.view(np.uint32) >> 16).astype(np.uint16)
    if slot.dtype != "float16":
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float16)
    if not np.isfinite(narrow).all():
        raise UnsupportedError(
            f"{name} holds values beyond float16's 65504 (up to {float(np.abs(array).max()):.3g}): export for a target "
            "that computes in float32, such as cpu"
        )
    return narrow
