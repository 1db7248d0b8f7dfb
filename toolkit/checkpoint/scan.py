"""Every byte of the checkpoint's files, read once and in order, hashed on the way, handed out by rows.

Reading in file order is what a disk does best, and hashing what is read anyway spares a second pass over 30 GB.
"""

from __future__ import annotations

import hashlib
import os
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

Bytes = NDArray[np.uint8]
# How far the system is asked to read ahead while what is here is being hashed.
_READ_AHEAD_BYTES: Final = 32 << 20


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a tensor, as stored; `raw` None where they have to be read, or made, anew."""

    name: str
    start: int
    stop: int
    raw: Bytes | None


def scan_file(
    path: Path, refs: list[TensorRef], chunk_bytes: int, buffer: Callable[[int], Bytes], digests: dict[str, str]
) -> Iterator[Rows]:
    """The rows of `refs`, all of one file, in file order, about `chunk_bytes` at a time, in buffers of the caller's.

    A buffer may still be in the hasher's hands when its rows are yielded, so it must stay as it is until the next one
    is asked for. When the iterator is exhausted `digests[path.name]` is the file's
    SHA-256. Raises CheckpointError if a read fails.
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
                    _read_ahead(file)
                    raw = read_from(file, buffer((stop - start) * row_bytes))
                    hasher.update(raw)
                    yield Rows(ref.name, start, stop, raw)
            _hash_gap(file, hasher, path.stat().st_size, chunk_bytes)
            digests[path.name] = hasher.hexdigest()
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror}") from None


def read_from(file: FileIO, buffer: Bytes) -> Bytes:
    """Fills `buffer` with the next bytes of an unbuffered file; raises CheckpointError if it ends before."""
    done = 0
    while done < buffer.nbytes:
        got = file.readinto(buffer[done:].data)
        if not got:
            raise CheckpointError(f"{file.name} ends at {file.tell()}, expected {buffer.nbytes - done} bytes more")
        done += got
    return buffer


def _read_ahead(file: FileIO) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), file.tell(), _READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


def _hash_gap(file: FileIO, hasher: _Hasher, end: int, chunk_bytes: int) -> None:
    """Hashes what no tensor of interest covers, up to the absolute offset `end`."""
    while (left := end - file.tell()) > 0:
        hasher.update(read_from(file, np.empty(min(left, chunk_bytes), np.uint8)))


class _Hasher:
    """SHA-256 on a thread of its own, at most one buffer behind the reader."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> _Hasher:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def update(self, raw: Bytes) -> None:
        self._wait()
        self._pending = self._pool.submit(self._sha.update, raw.data)

    def hexdigest(self) -> str:
        self._wait()
        return self._sha.hexdigest()

    def _wait(self) -> None:
        if self._pending:
            self._pending.result()
