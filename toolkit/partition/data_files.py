"""The data files of one or more bundles, opened to be filled; equal ones are one file with several names."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from toolkit.files import disk_error, replacing, write_text
from toolkit.graph.layout import Layout, Unit

JOURNAL_FILE: Final = "journal.jsonl"


@dataclass(frozen=True)
class Destination:
    """A bundle in the making: what its data files hold, and the folder they and the journal are in."""

    layout: Layout
    folder: Path

    @property
    def journal(self) -> Path:
        """Says which layout the data files have, then names the tensors whose bytes are on disk, a line each."""
        return self.folder / JOURNAL_FILE

    @property
    def journal_head(self) -> str:
        """The journal's first line: what lies where in another layout is nothing to go on from."""
        return json.dumps({"layout": self.layout.digest()}) + "\n"

    def is_begun(self) -> bool:
        """Whether every data file is there in its size and layout, so that the journal can be believed."""
        paths = {self.folder / file: nbytes for file, nbytes in self.layout.files.items()}
        whole = all(path.is_file() and path.stat().st_size == nbytes for path, nbytes in paths.items())
        return whole and self._has_head()

    def _has_head(self) -> bool:
        try:
            with self.journal.open("rb") as journal:
                return journal.readline() == self.journal_head.encode("ascii")
        except FileNotFoundError:
            return False


@dataclass(frozen=True)
class DataFile:
    """One file on disk, open for writing. `links` are (destination, file name) pairs that share it."""

    path: Path
    units: tuple[Unit, ...]
    nbytes: int
    handle: BinaryIO
    links: list[tuple[int, str]]
    lock: Lock = field(default_factory=Lock)

    def write(self, offset: int, left: memoryview) -> None:
        """All of `left` at `offset`. Raises MachineError if the disk is full."""
        try:
            with self.lock:
                self._write(offset, left)
        except OSError as problem:
            raise disk_error(problem, self.path) from None

    def write_rows(self, offset: int, rows: NDArray[np.uint8], stride: int) -> None:
        """Rows [N, bytes of one] from `offset` on, each `stride` bytes behind the one before. Raises MachineError if
        the disk is full."""
        count, each = rows.shape
        if stride == each:
            self.write(offset, rows.data.cast("B"))
            return
        try:
            with self.lock:
                # One read and one write in place of as many as there are rows; what lies between them stays.
                around = np.empty(count * stride, np.uint8)
                around[: (count - 1) * stride + each] = self._read(offset, (count - 1) * stride + each)
                around.reshape(count, stride)[:, :each] = rows
                self._write(offset, around[: (count - 1) * stride + each].data.cast("B"))
        except OSError as problem:
            raise disk_error(problem, self.path) from None

    def _write(self, offset: int, left: memoryview) -> None:
        self.handle.seek(offset)
        while left:
            left = left[self.handle.write(left) :]

    def _read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """The bytes as they are; the file has its full size, so they are there."""
        self.handle.seek(offset)
        found = np.zeros(nbytes, np.uint8)
        done = 0
        while done < nbytes and (got := self.handle.readinto(found[done:].data)):  # type: ignore[attr-defined]
            done += got
        return found


@contextmanager
def open_data_files(destinations: Sequence[Destination], resume: bool) -> Iterator[list[DataFile]]:
    """Every data file of all destinations in its full size. `resume` keeps what is in them; else the journals name
    nothing any more.

    Raises MachineError if one cannot be made.
    """
    if not resume:
        for destination in destinations:
            destination.journal.unlink(missing_ok=True)
    paths = [d.folder / name for d in destinations for name in d.layout.files]
    groups: list[tuple[Path, tuple[Unit, ...], int, list[tuple[int, str]]]] = []
    for k, destination in enumerate(destinations):
        for name, nbytes in destination.layout.files.items():
            path, units = destination.folder / name, destination.layout.in_file(name)
            equal = next((links for first, kept, _, links in groups if kept == units and _link(first, path)), None)
            if equal is not None:
                equal.append((k, name))
                continue
            try:
                _prepare(path, nbytes, resume, paths)
            except OSError as problem:
                raise disk_error(problem, path) from None
            groups.append((path, units, nbytes, [(k, name)]))
    if not resume:
        for destination in destinations:
            write_text(destination.journal, destination.journal_head)
    # Opened only now: Windows renames nothing onto or from a file that is open.
    with ExitStack() as stack:
        yield [
            DataFile(path, units, nbytes, stack.enter_context(path.open("r+b", buffering=0)), links)
            for path, units, nbytes, links in groups
        ]


def _prepare(path: Path, nbytes: int, resume: bool, own: Sequence[Path]) -> None:
    """A file of `nbytes` under this name that no finished bundle shares; `own` are the names this run may write."""
    if not resume:
        path.unlink(missing_ok=True)  # never truncated: a finished bundle may share it
        path.touch()
    elif path.stat().st_nlink > sum(other.exists() and os.path.samefile(path, other) for other in own):
        with replacing(path) as fresh:
            shutil.copyfile(path, fresh)
    os.truncate(path, nbytes)


def _link(existing: Path, path: Path) -> bool:
    """Makes `path` another name of `existing`; False where the file system has no hard links."""
    if path.exists() and os.path.samefile(existing, path):
        return True
    try:
        with replacing(path) as fresh:
            os.link(existing, fresh)
    except OSError:
        return False
    return True
