"""Every byte of the checkpoint's files, read once and in order, hashed on the way, handed out by rows.

Reading in file order is what a disk does best, and hashing what is read anyway spares a second pass over 30 GB.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.safetensors import TensorRef
from toolkit.errors import CheckpointError

Bytes = NDArray[np.uint8]
# Reads in flight. Reads around the page cache need several to keep a disk at work.
_READS_AHEAD: Final = 4
# What reads around the page cache must be aligned to, in memory, place and size.
_PAGE: Final = 4096


def _nothing() -> None:
    """Rows without memory of the scan's have none to give back."""


class ReadBytes:
    """How many bytes were read, added up on any thread."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = Lock()

    def add(self, nbytes: int) -> None:
        """Adds the bytes of one read to the total."""
        with self._lock:
            self.total += nbytes


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a tensor, as stored; `raw` None where they have to be read, or made, anew.

    Whoever is done with `raw` calls `release`, from any thread: the memory is then used for later rows.
    """

    name: str
    start: int
    stop: int
    raw: Bytes | None
    release: Callable[[], None] = _nothing


@dataclass(frozen=True)
class _Piece:
    """A stretch of a file: rows of a tensor, or what lies between (`name` empty)."""

    name: str
    start: int
    stop: int
    offset: int
    nbytes: int


def scan_file(
    path: Path, refs: list[TensorRef], chunk_bytes: int, direct: bool, digests: dict[str, str], read: ReadBytes
) -> Iterator[Rows]:
    """The rows of `refs`, all of one file, in file order, about `chunk_bytes` at a time.

    `direct` reads around the page cache where the system can. When the iterator is exhausted `digests[path.name]` is
    the file's SHA-256; `read` counts its bytes. Raises CheckpointError if a read fails.
    """
    sha = hashlib.sha256()
    pieces = _pieces(refs, path.stat().st_size, chunk_bytes)
    reader = _Reader(path, direct, read)
    buffers = _Buffers(max(piece.nbytes for piece in pieces) + 2 * _PAGE)
    try:
        with ThreadPoolExecutor(_READS_AHEAD) as readers, ThreadPoolExecutor(1) as hasher:
            upcoming = iter(pieces)
            ahead: deque[tuple[_Piece, Bytes, Future[Bytes]]] = deque()
            for piece in islice(upcoming, _READS_AHEAD):
                buffer = buffers.take()
                ahead.append((piece, buffer, readers.submit(reader.read, piece, buffer)))
            while ahead:
                piece, buffer, future = ahead.popleft()
                raw = future.result()
                hashed = hasher.submit(sha.update, raw.data)
                release = partial(buffers.give_back, buffer, hashed)
                for later in islice(upcoming, 1):
                    memory = buffers.take()
                    ahead.append((later, memory, readers.submit(reader.read, later, memory)))
                if piece.name:
                    yield Rows(piece.name, piece.start, piece.stop, raw, release)
                else:
                    release()
            hasher.submit(_nothing).result()
            digests[path.name] = sha.hexdigest()
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror}") from None
    finally:
        reader.close()


def whole_tensors(rows: Iterable[Rows], wanted: Callable[[str], bool]) -> Iterator[Rows]:
    """Yields the rows of a scan, those of each wanted tensor gathered into one piece: as they are stored, in memory of
    their own, and without `raw` where the pieces had none."""
    gathered: list[Rows] = []
    for piece in rows:
        if gathered and gathered[0].name != piece.name:
            yield _joined(gathered)
            gathered = []
        if wanted(piece.name):
            gathered.append(piece if piece.raw is None else Rows(piece.name, piece.start, piece.stop, piece.raw.copy()))
            piece.release()
        else:
            yield piece
    if gathered:
        yield _joined(gathered)


def _joined(pieces: list[Rows]) -> Rows:
    raws = [piece.raw for piece in pieces if piece.raw is not None]
    return Rows(pieces[0].name, pieces[0].start, pieces[-1].stop, np.concatenate(raws) if raws else None)


def read_exactly(path: Path, offset: int, nbytes: int, read: ReadBytes) -> Bytes:
    """`nbytes` bytes from `offset`, counted in `read`; raises CheckpointError if the file ends before."""
    reader = _Reader(path, False, read)
    try:
        return reader.read(_Piece("", 0, 0, offset, nbytes), np.empty(nbytes, np.uint8))
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read at {offset}: {problem.strerror}") from None
    finally:
        reader.close()


def _pieces(refs: list[TensorRef], size: int, chunk_bytes: int) -> list[_Piece]:
    """The whole file, in order."""
    pieces: list[_Piece] = []

    def add_gap(end: int) -> None:
        here = pieces[-1].offset + pieces[-1].nbytes if pieces else 0
        for offset in range(here, end, chunk_bytes):
            pieces.append(_Piece("", 0, 0, offset, min(chunk_bytes, end - offset)))

    for ref in sorted(refs, key=lambda r: r.offset):
        add_gap(ref.offset)
        rows = ref.shape[0] if ref.shape else 1
        row_bytes = ref.nbytes // max(rows, 1)
        step = max(1, chunk_bytes // max(row_bytes, 1))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            pieces.append(_Piece(ref.name, start, stop, ref.offset + start * row_bytes, (stop - start) * row_bytes))
    add_gap(size)
    return pieces


class _Buffers:
    """Page-aligned memory, used over and over: it stays in the cache, where fresh memory costs a fault every page."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._free: list[Bytes] = []

    def take(self) -> Bytes:
        """Returns a buffer that nobody uses, a fresh one where there is none."""
        try:
            return self._free.pop()
        except IndexError:
            return np.frombuffer(mmap.mmap(-1, self._nbytes), np.uint8)

    def give_back(self, buffer: Bytes, hashed: Future[None]) -> None:
        """Keeps a buffer for the next to take, once its bytes are hashed."""
        hashed.result()
        self._free.append(buffer)


class _Reader:
    """Positioned reads of one file, counted, around the page cache if asked and possible."""

    def __init__(self, path: Path, direct: bool, read: ReadBytes) -> None:
        self._path, self._read = path, read
        self._file = path.open("rb", buffering=0)
        self._lock = Lock()
        self._direct = -1
        if direct and hasattr(os, "O_DIRECT"):
            try:
                self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError:
                pass  # a file system without it

    def read(self, piece: _Piece, buffer: Bytes) -> Bytes:
        """Reads the bytes of a piece into `buffer` and returns the part of it that they fill."""
        self._read.add(piece.nbytes)
        if self._direct >= 0:
            first = piece.offset // _PAGE * _PAGE
            skipped = piece.offset - first
            wanted = -(-(skipped + piece.nbytes) // _PAGE) * _PAGE
            try:
                if os.preadv(self._direct, [buffer[:wanted].data], first) >= skipped + piece.nbytes:
                    return buffer[skipped : skipped + piece.nbytes]
            except OSError:
                pass  # what it cannot read the ordinary way may
        raw = buffer[: piece.nbytes]
        done = 0
        with self._lock:
            self._file.seek(piece.offset)
            while done < piece.nbytes:
                got = self._file.readinto(raw[done:].data)
                if not got:
                    raise CheckpointError(
                        f"{self._path} ends at {piece.offset + done}, expected {piece.nbytes - done} bytes more"
                    )
                done += got
        return raw

    def close(self) -> None:
        """Closes the file, which is open twice where it is read around the cache."""
        self._file.close()
        if self._direct >= 0:
            os.close(self._direct)
