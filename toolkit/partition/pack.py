"""The streaming pass: every row of the checkpoint once, in file order, to its place in the data file.

A few row chunks are in memory at a time, whatever the size of the checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Final

from toolkit.checkpoint.scan import Rows
from toolkit.checkpoint.weights import WeightSource
from toolkit.errors import MachineError
from toolkit.graph.layout import Layout
from toolkit.machine import fits_the_page_cache
from toolkit.partition.prefix_hash import PrefixHash
from toolkit.partition.rows import Packed, RowPacker

# Source bytes read at a time: long enough for the disk, short enough that a handful of them stay in a cache.
CHUNK_BYTES: Final = 2 << 20
# What one fsync covers: often enough that a kill costs seconds, seldom enough that the disk keeps streaming.
_COMMIT_BYTES: Final = 256 << 20


@dataclass(frozen=True)
class TensorError:
    """What quantizing one checkpoint tensor cost: sums of squares of the weights and of their errors."""

    tensor: str
    signal: float
    noise: float


@dataclass(frozen=True)
class PackResult:
    """Every tensor's error, and the SHA-256 of the data file."""

    errors: list[TensorError]
    sha256: str


def pack_weights(
    source: WeightSource, layout: Layout, path: Path, journal: Path, progress: Callable[[str], None] = lambda _: None
) -> PackResult:
    """Writes the data file; tensors named in `journal` are whole already and only read, to be hashed.

    A tensor enters the journal after its bytes are on disk, so a kill loses a few hundred megabytes of work at most.
    `progress` is called with the name of each finished tensor. Raises MachineError when the disk fills, NonFiniteError
    for NaN or infinity.
    """
    if not (path.exists() and path.stat().st_size == layout.nbytes):
        journal.unlink(missing_ok=True)  # it speaks of a file that is gone
    done = _read_journal(journal)
    try:
        with path.open("r+b" if done else "w+b", buffering=0) as file:
            file.truncate(layout.nbytes)
            packer = RowPacker(source, layout, file, path)
            with _Journal(layout, file, path, journal, done, progress) as log, _Window(log.add) as window:
                for rows in source.scan(CHUNK_BYTES):
                    if rows.name in done:
                        rows.release()
                    else:
                        window.submit(packer.pack, rows)
    except OSError as problem:
        raise MachineError(f"{path} cannot be written: {problem.strerror}; free space and run again") from None
    return PackResult(list(done.values()), log.sha256())


class _Window:
    """Rows at work on every core, and as many again waiting, so that reading never runs far ahead."""

    def __init__(self, on_packed: Callable[[Packed], None]) -> None:
        self._workers = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._workers)
        self._pending: dict[Future[Packed], Rows] = {}
        self._on_packed = on_packed

    def __enter__(self) -> _Window:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._collect(0)
        finally:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, pack: Callable[[Rows], Packed], rows: Rows) -> None:
        """Queues rows; waits while the window is full. Raises what packing raised."""
        self._collect(2 * self._workers - 1)
        self._pending[self._pool.submit(pack, rows)] = rows

    def _collect(self, leave: int) -> None:
        while len(self._pending) > leave:
            for future in wait(self._pending, return_when=FIRST_COMPLETED).done:
                self._pending.pop(future).release()
                self._on_packed(future.result())


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


class _Journal:
    """Adds up what is packed of each tensor; names those that are whole once their bytes are on disk."""

    def __init__(
        self,
        layout: Layout,
        file: BinaryIO,
        path: Path,
        journal: Path,
        done: dict[str, TensorError],
        progress: Callable[[str], None],
    ) -> None:
        units = layout.units.values()
        self._rows_left = {name: rows for u in units for name, rows in zip(u.sources, u.rows, strict=True)}
        self._sums: dict[str, tuple[float, float]] = {}
        self._file, self._journal, self._done, self._progress = file, journal, done, progress
        # At two bytes a weight in, about what is read and written in all.
        streamed_bytes = 2 * layout.weights() + layout.nbytes
        self._hash = PrefixHash(layout, path, keep_cached=fits_the_page_cache(streamed_bytes))
        self._committer = ThreadPoolExecutor(1)
        self._commit: Future[None] | None = None
        self._finished: list[TensorError] = []
        self._uncommitted_bytes = 0

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # Finished work is kept whatever ended the run.
            self._commit_finished()
            if self._commit:
                self._commit.result()
        except OSError:
            if kind is None:
                raise
        finally:
            self._committer.shutdown()

    def add(self, packed: Packed) -> None:
        """Counts some rows of a tensor as written."""
        before = self._sums.get(packed.name, (0.0, 0.0))
        self._sums[packed.name] = (before[0] + packed.signal, before[1] + packed.noise)
        self._rows_left[packed.name] -= packed.rows
        self._uncommitted_bytes += packed.nbytes
        if not self._rows_left[packed.name]:
            self._finished.append(TensorError(packed.name, *self._sums.pop(packed.name)))
            self._progress(packed.name)
        if self._uncommitted_bytes >= _COMMIT_BYTES and (self._commit is None or self._commit.done()):
            self._commit_finished()

    def _commit_finished(self) -> None:
        """Syncs the data on a thread of its own, then names the finished tensors."""
        if self._commit:
            self._commit.result()
        finished, self._finished, self._uncommitted_bytes = self._finished, [], 0
        self._commit = self._committer.submit(self._write, finished)

    def sha256(self) -> str:
        """Of the data file, once the journal is closed without an error."""
        return self._hash.hexdigest()

    def _write(self, finished: list[TensorError]) -> None:
        os.fsync(self._file.fileno())
        with self._journal.open("a", encoding="utf-8") as log:
            for entry in finished:
                log.write(json.dumps(asdict(entry)) + "\n")
                self._done[entry.tensor] = entry
            log.flush()
            os.fsync(log.fileno())
        self._hash.finish(list(self._done))
