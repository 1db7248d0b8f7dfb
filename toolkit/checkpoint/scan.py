"""Every byte of the checkpoint's files, read once and in order, hashed on the way, handed out by rows.

Reading in file order is what a disk does best, and hashing what is read anyway spares a second pass over 30 GB.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.safetensors import TensorRef
from toolkit.errors import CheckpointError

# Reading may run this many buffers ahead of hashing.
_HASH_AHEAD: Final = 4


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a tensor. `values()` widens (or makes) them as float32 and checks that they are finite;
    it is the costly part and may be called on any thread."""

    name: str
    start: int
    stop: int
    values: Callable[[], NDArray[np.float32]]


@dataclass(frozen=True)
class RawRows:
    """The undecoded bytes of some rows."""

    ref: TensorRef
    start: int
    stop: int
    raw: NDArray[np.uint8]


def scan_file(path: Path, refs: list[TensorRef], chunk_bytes: int, digests: dict[str, str]) -> Iterator[RawRows]:
    """The rows of `refs`, all of one file, in file order, about `chunk_bytes` at a time.

    When the iterator is exhausted `digests[path.name]` is the file's SHA-256. Raises CheckpointError if a read fails.
    """
    try:
        with path.open("rb", buffering=0) as file, _Hasher() as hasher:
            for ref in sorted(refs, key=lambda r: r.offset):
                _hash_gap(file, hasher, ref.offset, chunk_bytes)
                rows = ref.shape[0] if ref.shape else 1
                row_bytes = ref.nbytes // max(rows, 1)
                step = max(1, chunk_bytes // max(row_bytes, 1))
                for start in range(0, rows, step):
                    stop = min(rows, start + step)
                    raw = read_from(file, (stop - start) * row_bytes)
                    hasher.update(raw)
                    yield RawRows(ref, start, stop, raw)
            _hash_gap(file, hasher, path.stat().st_size, chunk_bytes)
            digests[path.name] = hasher.hexdigest()
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror}") from None


def read_from(file: FileIO, nbytes: int) -> NDArray[np.uint8]:
    """The next `nbytes` bytes of an unbuffered file; raises CheckpointError if it ends before."""
    buffer = np.empty(nbytes, dtype=np.uint8)
    done = 0
    while done < nbytes:
        got = file.readinto(buffer[done:].data)
        if not got:
            raise CheckpointError(f"{file.name} ends at {file.tell()}, expected {nbytes - done} bytes more")
        done += got
    return buffer


def _hash_gap(file: FileIO, hasher: _Hasher, end: int, chunk_bytes: int) -> None:
    """Hashes what no tensor of interest covers, up to the absolute offset `end`."""
    while (left := end - file.tell()) > 0:
        hasher.update(read_from(file, min(left, chunk_bytes)))


class _Hasher:
    """SHA-256 on a thread of its own, in order, a few buffers behind the reader."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> _Hasher:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def update(self, raw: NDArray[np.uint8]) -> None:
        if len(self._pending) >= _HASH_AHEAD:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._sha.update, raw.data))

    def hexdigest(self) -> str:
        while self._pending:
            self._pending.popleft().result()
        return self._sha.hexdigest()
