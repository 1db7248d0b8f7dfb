"""The streaming pass: rows in file order, quantized on every core, written at known offsets.

A few row chunks are in memory at a time, whatever the size of the checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.scan import Rows
from toolkit.checkpoint.weights import WeightSource
from toolkit.errors import MachineError
from toolkit.graph.layout import Layout, Slot, Unit
from toolkit.quant.blockwise import quantize_blocks

# Source bytes read at a time: long reads for the disk, short enough that a handful of them fit anywhere.
CHUNK_BYTES: Final = 4 << 20
# What one fsync covers: often enough that a kill costs seconds, seldom enough that the disk keeps streaming.
_COMMIT_BYTES: Final = 256 << 20


@dataclass(frozen=True)
class TensorError:
    """What quantizing one checkpoint tensor cost: sums of squares of the weights and of their errors."""

    tensor: str
    signal: float
    noise: float


def pack_weights(
    source: WeightSource, layout: Layout, path: Path, journal: Path, progress: Callable[[str], None] = lambda _: None
) -> list[TensorError]:
    """Writes the data file; tensors named in `journal` are whole already and only read, to be hashed.

    A tensor enters the journal after its bytes are on disk, so a kill loses a few hundred megabytes of work at most.
    `progress` is called with the name of each finished tensor. Raises MachineError when the disk fills.
    """
    done = _read_journal(journal) if path.exists() and path.stat().st_size == layout.nbytes else {}
    try:
        with path.open("r+b" if done else "w+b", buffering=0) as file:
            file.truncate(layout.nbytes)
            with _Packer(layout, file, journal, done, progress) as packer:
                for rows in source.scan(CHUNK_BYTES):
                    packer.submit(rows)
    except OSError as problem:
        raise MachineError(f"{path} cannot be written: {problem.strerror}; free space and run again") from None
    return list(done.values())


def _read_journal(journal: Path) -> dict[str, TensorError]:
    """Finished tensors; a line torn by a kill is dropped, and the journal rewritten without it."""
    done: dict[str, TensorError] = {}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []:
        try:
            entry = TensorError(**json.loads(line))
        except (ValueError, TypeError):
            break
        done[entry.tensor] = entry
    whole = "".join(json.dumps(asdict(entry)) + "\n" for entry in done.values())
    fresh = journal.with_name(journal.name + ".new")
    fresh.write_text(whole, encoding="utf-8")
    os.replace(fresh, journal)
    return done


class _Packer:
    """Chunks in flight, tensors half done, tensors done but not yet committed."""

    def __init__(
        self,
        layout: Layout,
        file: BinaryIO,
        journal: Path,
        done: dict[str, TensorError],
        progress: Callable[[str], None],
    ) -> None:
        places = [(unit, k, source) for unit in layout.units.values() for k, source in enumerate(unit.sources)]
        self._places = {source: (unit, sum(unit.rows[:k])) for unit, k, source in places}
        self._rows_left = {source: unit.rows[k] for unit, k, source in places}
        self._sums: dict[str, tuple[float, float]] = {}
        self._file, self._journal, self._done, self._progress = file, journal, done, progress
        self._lock = Lock()
        self._workers = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._workers)
        self._committer = ThreadPoolExecutor(1)
        self._commit: Future[None] | None = None
        self._pending: dict[Future[tuple[float, float, int]], Rows] = {}
        self._finished: list[TensorError] = []
        self._finished_bytes = 0

    def __enter__(self) -> _Packer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._collect(0)
                self._commit_finished()
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._committer.shutdown()
        if kind is None and self._commit:
            self._commit.result()

    def submit(self, rows: Rows) -> None:
        """Queues rows for quantizing; blocks while enough are queued to keep every core at work."""
        if rows.name in self._done:
            return
        self._collect(2 * self._workers)
        unit, base = self._places[rows.name]
        self._pending[self._pool.submit(_pack_rows, unit, base, rows, self._file, self._lock)] = rows

    def _collect(self, leave: int) -> None:
        while len(self._pending) > leave:
            for future in wait(self._pending, return_when=FIRST_COMPLETED).done:
                rows = self._pending.pop(future)
                signal, noise, nbytes = future.result()
                before = self._sums.get(rows.name, (0.0, 0.0))
                self._sums[rows.name] = (before[0] + signal, before[1] + noise)
                self._rows_left[rows.name] -= rows.stop - rows.start
                self._finished_bytes += nbytes
                if not self._rows_left[rows.name]:
                    self._finished.append(TensorError(rows.name, *self._sums.pop(rows.name)))
                    self._progress(rows.name)
        if self._finished_bytes >= _COMMIT_BYTES:
            self._commit_finished()

    def _commit_finished(self) -> None:
        """Syncs the data on a thread of its own, then names the finished tensors in the journal."""
        if self._commit:
            self._commit.result()
        finished, self._finished, self._finished_bytes = self._finished, [], 0
        self._commit = self._committer.submit(self._write_journal, finished)

    def _write_journal(self, finished: list[TensorError]) -> None:
        os.fsync(self._file.fileno())
        with self._journal.open("a", encoding="utf-8") as log:
            for entry in finished:
                log.write(json.dumps(asdict(entry)) + "\n")
                self._done[entry.tensor] = entry
            log.flush()
            os.fsync(log.fileno())


def _pack_rows(unit: Unit, base: int, rows: Rows, file: BinaryIO, lock: Lock) -> tuple[float, float, int]:
    """(signal, noise, bytes written) of some rows; `base` is where their tensor starts in the unit."""
    values = rows.values()
    arrays: list[NDArray[np.float32] | NDArray[np.uint8]] = [values]
    noise = 0.0
    if unit.spec is not None:
        blocks = quantize_blocks(values, unit.spec)
        arrays, noise = [blocks.packed, blocks.scales], blocks.noise
        if blocks.zero_points is not None:
            arrays.append(blocks.zero_points)
    with lock:
        for slot, array in zip(unit.slots, arrays, strict=True):
            _write_at(file, _row_offset(slot, base + rows.start), array)
    flat = values.reshape(-1)
    return float(np.vdot(flat, flat)), noise, sum(array.nbytes for array in arrays)


def _write_at(file: BinaryIO, offset: int, array: NDArray[np.float32] | NDArray[np.uint8]) -> None:
    file.seek(offset)
    left = np.ascontiguousarray(array).data.cast("B")
    while left:
        left = left[file.write(left) :]


def _row_offset(slot: Slot, row: int) -> int:
    return slot.offset + row * (slot.nbytes // slot.shape[0])
