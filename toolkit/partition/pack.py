"""The streaming pass: read rows, quantize, write at known offsets. A few row chunks are in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.weights import WeightSource
from toolkit.errors import MachineError
from toolkit.graph.layout import Layout, Slot, Unit
from toolkit.quant.blockwise import quantize_blocks

_CHUNK_ELEMENTS = 2 << 20


def pack_weights(source: WeightSource, layout: Layout, path: Path, journal: Path) -> None:
    """Writes the data file; units named in `journal` are whole already and are skipped.

    A unit enters the journal after its bytes are on disk, so a kill at any point loses at most the unit at work.
    Raises MachineError when the disk fills.
    """
    done = set(journal.read_text(encoding="utf-8").split()) if journal.exists() and path.exists() else set()
    try:
        with path.open("r+b" if done else "w+b") as file, journal.open("a" if done else "w", encoding="utf-8") as log:
            file.truncate(layout.nbytes)
            lock = Lock()
            with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
                for unit in layout.units.values():
                    if unit.name in done:
                        continue
                    _pack_unit(source, unit, file, lock, pool)
                    file.flush()
                    os.fsync(file.fileno())
                    print(unit.name, file=log, flush=True)
    except OSError as problem:
        raise MachineError(f"{path} cannot be written: {problem.strerror}; free space and run again") from None


def _pack_unit(source: WeightSource, unit: Unit, file: BinaryIO, lock: Lock, pool: ThreadPoolExecutor) -> None:
    pending: set[Future[None]] = set()
    for name, start, stop, row in _chunks(unit):
        if len(pending) >= 2 * (os.cpu_count() or 1):
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
        pending.add(pool.submit(_pack_rows, source, unit, (name, start, stop, row), file, lock))
    for future in pending:
        future.result()


def _chunks(unit: Unit) -> Iterator[tuple[str, int, int, int]]:
    """(tensor, first row, end row, row in the unit)."""
    step = max(1, _CHUNK_ELEMENTS // unit.width)
    base = 0
    for name, rows in zip(unit.sources, unit.rows, strict=True):
        for start in range(0, rows, step):
            yield name, start, min(rows, start + step), base + start
        base += rows


def _pack_rows(
    source: WeightSource, unit: Unit, chunk: tuple[str, int, int, int], file: BinaryIO, lock: Lock
) -> None:
    name, start, stop, row = chunk
    values = source.read_rows(name, start, stop)
    arrays: list[NDArray[np.float32] | NDArray[np.uint8]] = [values]
    if unit.spec is not None:
        blocks = quantize_blocks(values, unit.spec)
        arrays = [blocks.packed, blocks.scales]
        if blocks.zero_points is not None:
            arrays.append(blocks.zero_points)
    with lock:
        for slot, array in zip(unit.slots, arrays, strict=True):
            file.seek(_row_offset(slot, row))
            file.write(np.ascontiguousarray(array).data)


def _row_offset(slot: Slot, row: int) -> int:
    return slot.offset + row * (slot.nbytes // slot.shape[0])
