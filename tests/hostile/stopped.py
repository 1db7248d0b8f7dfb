"""Something happens to a command of the toolkit at one event: a signal, or a disk that is full from then on.

An event is a change of the file system below a folder, or a wait for the disk, just before it is made.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_CHANGES: Final = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
# What a full disk refuses: names and bytes; it lets go of files.
_NEED_ROOM: Final = ("open", "os.mkdir", "os.link", "fsync", "os.truncate")
_SIGNALS: Final = {"kill": "SIGKILL", "term": "SIGTERM", "interrupt": "SIGINT"}
FULL: Final = "full"
HOWS: Final = (*_SIGNALS, FULL)


@dataclass(frozen=True)
class Stop:
    """`how` it is stopped at event number `at`, counted from 1, below `folder`."""

    folder: Path
    at: int
    how: str


def never(folder: Path) -> Stop:
    """One that does not come, so that events below a folder are counted alone."""
    return Stop(folder, 1 << 60, "kill")


class Events:
    """Counts events from where it stands, and lets a stop happen; `names` says what each was, and of which file."""

    def __init__(self, stop: Stop) -> None:
        self._folder, self._at, self._how = str(stop.folder), stop.at, stop.how
        self._lock = threading.Lock()
        self.names: list[str] = []
        self._fsync = os.fsync
        setattr(os, "fsync", self._synced)  # noqa: B010  a stand-in of another type
        sys.addaudithook(self._seen)

    def _synced(self, descriptor: Any) -> None:
        """Raises no audit event."""
        self._count("fsync", str(descriptor))
        self._fsync(descriptor)

    def _seen(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = given
            writes = any(sign in mode for sign in "wax+") if isinstance(mode, str) else bool(flags & 3)
            if writes and self._is_below(path):
                self._count("open", os.fspath(path))
        elif event in _CHANGES:
            path = given[1] if event in ("os.rename", "os.link", "os.symlink") else given[0]
            if self._is_below(path):
                self._count(event, os.fspath(path))

    def _is_below(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(self._folder)

    def _count(self, name: str, of: str) -> None:
        with self._lock:
            self.names.append(f"{name} {Path(of).name}")
            count = len(self.names)
        if self._how == FULL:
            if count >= self._at and name in _NEED_ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), of)
        elif count == self._at:
            os.kill(os.getpid(), getattr(signal, _SIGNALS[self._how]))
