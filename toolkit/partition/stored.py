"""A bundle's weights as they lie in its data files, read back for a forward pass: what is stored, not what was meant.

N output features, K input features, J blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from toolkit.graph.layout import Layout, Slot, Unit
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, dequantize_blocks, signed_levels

Floats = NDArray[np.float32]
_DTYPES: Final = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
# Input features of a turned matrix taken at a time.
_TURNED: Final = 512


class StoredTensors:
    """A `Tensors` over the data files in `folder`, by the checkpoint's names; `bytes_read` counts what was read."""

    def __init__(self, layout: Layout, folder: Path) -> None:
        self._folder = folder
        self.bytes_read = 0
        self._places = {name: (unit, place) for unit in layout.units.values() for name, place in unit.places().items()}

    def names(self) -> list[str]:
        """Lists the name of every packed tensor."""
        return list(self._places)

    def read(self, name: str) -> Floats:
        """A whole tensor, a matrix as [N, K]."""
        unit, place = self._places[name]
        if unit.spec is not None and unit.spec.signed:
            return self._turned(unit)[place]
        return self._rows(unit, place)

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows of a tensor; of a signed matrix they lie apart, so that it is read whole."""
        unit, place = self._places[name]
        if unit.spec is not None and unit.spec.signed:
            return self.read(name)[start:stop]
        first, last = place.start + start * place.step, place.start + stop * place.step
        return self._rows(unit, slice(first, last, place.step))

    def blocks(self, name: str) -> tuple[QuantizedBlocks, QuantSpec] | None:
        """A matrix in blocks along its rows, as it is stored; None for a tensor of floats."""
        unit, place = self._places[name]
        return None if unit.spec is None else (self._blocks(unit, place), unit.spec)

    def _rows(self, unit: Unit, place: slice) -> Floats:
        """Rows of a unit that holds floats, or blocks along its rows."""
        if unit.spec is None:
            return np.asarray(self._slots(unit, place)[0], np.float32)
        return dequantize_blocks(self._blocks(unit, place), unit.spec, unit.width)

    def _blocks(self, unit: Unit, place: slice) -> QuantizedBlocks:
        packed, scales, *zero_points = self._slots(unit, place)
        return QuantizedBlocks(packed, _widened(scales), zero_points[0] if zero_points else None, 0.0)

    def _slots(self, unit: Unit, place: slice) -> list[NDArray[Any]]:
        # What stands between is read along: it lies on the same pages.
        end = min(place.stop, sum(unit.rows))
        return [self._slot_rows(slot, place.start, end)[:: place.step] for slot in unit.slots]

    def _turned(self, unit: Unit) -> Floats:
        """[N, K] of a signed matrix, which lies as [K, N] with scales [J, N] or [N]; its zero points are zeros."""
        integers, scale, _ = unit.slots
        assert unit.spec is not None
        K, N = integers.shape
        scales = self._slot_rows(scale, 0, scale.shape[0]).astype(np.float32).reshape(-1, N)
        weight = np.empty((N, K), np.float32)
        for start in range(0, K, _TURNED):
            stop = min(K, start + _TURNED)
            # A row of an odd number of 4-bit values ends within a byte; an even number of rows does not.
            first, end = start * N * unit.spec.bits // 8, -(-stop * N * unit.spec.bits // 8)
            levels = signed_levels(self._read(integers, first, end), unit.spec.bits)[: (stop - start) * N].reshape(
                -1, N
            )
            weight[:, start:stop] = (levels * scales[np.arange(start, stop) // unit.spec.block_size]).T
        return weight

    def _slot_rows(self, slot: Slot, start: int, stop: int) -> NDArray[Any]:
        """Returns rows [start, stop) of a slot along its first axis, as they are stored."""
        found = self._bytes(slot, start, stop)
        return found.view(_DTYPES.get(slot.dtype, np.uint8)).reshape(stop - start, *slot.shape[1:])

    def _bytes(self, slot: Slot, start: int, stop: int) -> NDArray[np.uint8]:
        """Of entries [start, stop) along the first axis, each a whole number of bytes."""
        each = slot.nbytes // slot.shape[0]
        return self._read(slot, start * each, stop * each)

    def _read(self, slot: Slot, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of an array."""
        with (self._folder / slot.file).open("rb") as file:
            file.seek(slot.offset + start)
            self.bytes_read += stop - start
            return np.frombuffer(file.read(stop - start), np.uint8)


def _widened(scales: NDArray[Any]) -> Floats:
    """Stored scales as float32; those of bfloat16 come as its bits."""
    if scales.dtype == np.uint16:
        return (scales.astype(np.uint32) << 16).view(np.float32)
    return scales.astype(np.float32)
