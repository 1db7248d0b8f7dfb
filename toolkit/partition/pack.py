"""The streaming pass: every row of the checkpoint once, in file order, to its places in the data files.

A few row chunks are in memory at a time, whatever the size of the checkpoint.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.scan import Rows
from toolkit.checkpoint.weights import WeightSource
from toolkit.files import disk_error, write_text
from toolkit.machine import fits_the_page_cache, threads
from toolkit.partition.data_files import DataFile, Destination, open_data_files
from toolkit.partition.prefix_hash import PrefixHash
from toolkit.partition.rows import Packed, RowPacker
from toolkit.typed_json import from_json

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
    """Every tensor's error, the SHA-256 of each data file, and how many bytes of these were read to hash them."""

    errors: list[TensorError]
    sha256: dict[str, str]
    bytes_read: int


def pack_weights(
    source: WeightSource,
    destinations: Sequence[Destination],
    progress: Callable[[str], None] = lambda _: None,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
) -> list[PackResult]:
    """Writes the data files of every destination in one pass, quantizing once for each format.

    Tensors that every journal names are whole already and only read, to be hashed. A tensor enters the journals after
    its bytes are on disk, so a kill loses a few hundred megabytes of work at most. `progress` is called with the name
    of each finished tensor; `importance` [K] by tensor weighs the errors of its columns. Raises MachineError when the
    disk fills, NonFiniteError for NaN or infinity, UnsupportedError for what float16 cannot hold.
    """
    journals = _read_journals(destinations)
    done = set(journals[0])
    try:
        with open_data_files(destinations, resume=bool(done)) as files:
            packer = RowPacker(source, files, importance or {})
            with _Journal(destinations, files, journals, progress) as log, _Window(log.add) as window:
                for rows in source.scan(CHUNK_BYTES):
                    if rows.name in done:
                        rows.release()
                    else:
                        window.submit(packer.pack, rows)
    except OSError as problem:
        raise disk_error(problem, *(destination.folder for destination in destinations)) from None
    return [PackResult(list(journal.values()), *log.hashed(k)) for k, journal in enumerate(journals)]


class _Window:
    """Rows at work on every core, and as many again waiting, so that reading never runs far ahead."""

    def __init__(self, on_packed: Callable[[Packed], None]) -> None:
        self._workers = threads()
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


def _read_journals(destinations: Sequence[Destination]) -> list[dict[str, TensorError]]:
    """Tensors that are whole at every destination; the journals are rewritten without the others.

    One that is whole at some has to be made anew for the rest, perhaps in a file they are about to share.
    """
    read = [_read_journal(d) if d.is_begun() else {} for d in destinations]
    common = set.intersection(*(set(journal) for journal in read))
    kept = [{name: entry for name, entry in journal.items() if name in common} for journal in read]
    for destination, journal in zip(destinations, kept, strict=True):
        whole = "".join(json.dumps(asdict(entry)) + "\n" for entry in journal.values())
        write_text(destination.journal, destination.journal_head + whole)
    return kept


def _read_journal(destination: Destination) -> dict[str, TensorError]:
    """Finished tensors, up to a line that is torn or damaged; what that and later ones name is made again."""
    journal, done = destination.journal, dict[str, TensorError]()
    known = {name for unit in destination.layout.units.values() for name in unit.sources}
    for line in journal.read_bytes().splitlines()[1:]:
        try:
            entry = from_json(TensorError, json.loads(line), str(journal))
        except (ValueError, RecursionError):
            break
        if entry.tensor not in known or not (0 <= entry.signal < math.inf and 0 <= entry.noise < math.inf):
            break
        done[entry.tensor] = entry
    return done


class _Journal:
    """Adds up what is packed of each tensor; names those that are whole once their bytes are on disk."""

    def __init__(
        self,
        destinations: Sequence[Destination],
        files: Sequence[DataFile],
        journals: list[dict[str, TensorError]],
        progress: Callable[[str], None],
    ) -> None:
        units = destinations[0].layout.units.values()
        self._rows_left = {name: rows for u in units for name, rows in zip(u.sources, u.rows, strict=True)}
        self._specs = [
            {name: unit.spec for unit in destination.layout.units.values() for name in unit.sources}
            for destination in destinations
        ]
        self._sums: dict[str, list[Packed]] = defaultdict(list)
        self._destinations, self._files, self._journals = destinations, files, journals
        self._progress = progress
        # At two bytes a weight in, about what is read and written in all.
        streamed_bytes = 2 * destinations[0].layout.weights() + sum(file.nbytes for file in files)
        cached = fits_the_page_cache(streamed_bytes)
        self._hashes = [PrefixHash(file.units, file.nbytes, file.path, keep_cached=cached) for file in files]
        self._committer = ThreadPoolExecutor(1)
        self._commit: Future[None] | None = None
        self._finished: list[list[TensorError]] = []
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
        name = packed.name
        self._sums[name].append(packed)
        self._rows_left[name] -= packed.rows
        self._uncommitted_bytes += packed.nbytes
        if not self._rows_left[name]:
            pieces = self._sums.pop(name)
            signal = sum(piece.signal for piece in pieces)
            noise = [sum(piece.noise[specs[name]] for piece in pieces) for specs in self._specs]
            self._finished.append([TensorError(name, signal, lost) for lost in noise])
            self._progress(name)
        if self._uncommitted_bytes >= _COMMIT_BYTES and (self._commit is None or self._commit.done()):
            self._commit_finished()

    def _commit_finished(self) -> None:
        """Syncs the data on a thread of its own, then names the finished tensors."""
        if self._commit:
            self._commit.result()
        finished, self._finished, self._uncommitted_bytes = self._finished, [], 0
        self._commit = self._committer.submit(self._write, finished)

    def hashed(self, destination: int) -> tuple[dict[str, str], int]:
        """The SHA-256 of each data file of a destination, and the bytes read for them; known once the journal is closed
        without an error."""
        own = {
            name: running
            for file, running in zip(self._files, self._hashes, strict=True)
            for k, name in file.links
            if k == destination
        }
        return {name: running.hexdigest() for name, running in own.items()}, sum(r.bytes_read for r in own.values())

    def _write(self, finished: list[list[TensorError]]) -> None:
        for file in self._files:
            os.fsync(file.handle.fileno())
        for k, (destination, journal) in enumerate(zip(self._destinations, self._journals, strict=True)):
            fresh = [errors[k] for errors in finished]
            with destination.journal.open("a", encoding="utf-8") as log:
                log.writelines(json.dumps(asdict(entry)) + "\n" for entry in fresh)
                log.flush()
                os.fsync(log.fileno())
            journal.update((entry.tensor, entry) for entry in fresh)
        for running in self._hashes:
            running.finish(list(self._journals[0]))
