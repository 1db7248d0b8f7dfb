"""Objects whose arrays lie in files that processes of one machine map into memory.

What is sent between processes is written to a socket and read from it, and copied on both sides; what is mapped is
written once, and its pages are the same for all who read it. What came in such a file is sent on by its name.
"""

from __future__ import annotations

import mmap
import pickle
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

# Where arrays begin in a file: a vector register's width divides it, and a cache line's.
_ALIGNED: Final = 64
# An array that cannot be written to cannot be where it is sent to either, and loops would be compiled for it apart.
_TAKEN_FOR: Final = mmap.ACCESS_COPY


class _Taken(mmap.mmap):
    """A file that goes with the last array in it."""

    path: str
    address: int

    def __del__(self) -> None:
        # Windows keeps a file that is mapped.
        self.close()
        with suppress(OSError):
            Path(self.path).unlink()


@dataclass(frozen=True)
class _Place:
    """So many bytes of a file, this parcel's own where none is named."""

    start: int
    nbytes: int
    path: str = ""


def put(folder: Path, content: object) -> str:
    """Writes an object to a file of its own in a folder that is there; returns the file's path. Arrays that were taken
    from another such file are named, not written: they have to stay until this one is read."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(content, protocol=5, buffer_callback=buffers.append)
    places, written, end = list[_Place](), list[memoryview](), 0
    for piece in (memoryview(pickled), *(buffer.raw() for buffer in buffers)):
        if not (place := _taken_from(piece)):
            place = _Place(end, piece.nbytes)
            written.append(piece)
            end = _aligned(end + piece.nbytes)
        places.append(place)
    path = folder / uuid.uuid4().hex
    with path.open("wb") as out:
        head = pickle.dumps(places)
        out.write(len(head).to_bytes(8, "little") + head)
        for piece in written:
            out.seek(_aligned(out.tell()))
            out.write(piece)
    return str(path)


def get(path: str) -> Any:
    """Reads the object of a file that `put` wrote. What is written to its arrays stays in this process."""
    return _read(_mapped(path))


def take(path: str) -> Any:
    """Reads the object of a file that `put` wrote, and removes the file once nobody has an array of it any more. Its
    arrays are not to be written to: they are sent on as the file has them."""
    with Path(path).open("rb") as file:
        taken = _Taken(file.fileno(), 0, access=_TAKEN_FOR)
    taken.path, taken.address = path, _address(memoryview(taken))
    return _read(memoryview(taken))


def _mapped(path: str) -> memoryview:
    with Path(path).open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def _read(own: memoryview) -> Any:
    head = 8 + int.from_bytes(own[:8], "little")
    places: list[_Place] = pickle.loads(own[8:head])
    others = {path: _mapped(path) for path in {place.path for place in places} if path}
    views = []
    for place in places:
        start = place.start if place.path else _aligned(head) + place.start
        views.append(others.get(place.path, own)[start : start + place.nbytes])
    return pickle.loads(views[0], buffers=views[1:])


def _taken_from(piece: memoryview) -> _Place | None:
    """Returns where an array lies in a file that was taken, if it does."""
    owner: object = piece.obj
    while isinstance(owner, np.ndarray):
        owner = owner.base
    owner = owner.obj if isinstance(owner, memoryview) else owner
    if not isinstance(owner, _Taken):
        return None
    start = _address(piece) - owner.address
    return _Place(start, piece.nbytes, owner.path) if start % _ALIGNED == 0 else None


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data) if view.nbytes else 0


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNED) * _ALIGNED
