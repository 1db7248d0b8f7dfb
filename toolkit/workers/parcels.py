"""Objects whose arrays lie in files that processes of one machine map into memory.

What is sent between processes is written to a socket and read from it, and copied on both sides; what is mapped is
written once, and its pages are the same for all who read it.
"""

from __future__ import annotations

import mmap
import pickle
import uuid
from pathlib import Path
from typing import Any, Final

# Where arrays begin in a file: a vector register's width divides it, and a cache line's.
_ALIGNED: Final = 64


def put(folder: Path, content: object) -> str:
    """Writes an object to a file of its own in a folder that is there; returns the file's path."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(content, protocol=5, buffer_callback=buffers.append)
    pieces = [memoryview(pickled), *(buffer.raw() for buffer in buffers)]
    path = folder / uuid.uuid4().hex
    with path.open("wb") as out:
        sizes = pickle.dumps([piece.nbytes for piece in pieces])
        out.write(len(sizes).to_bytes(8, "little") + sizes)
        for piece in pieces:
            out.seek(_aligned(out.tell()))
            out.write(piece)
    return str(path)


def get(path: str) -> Any:
    """Reads the object of a file that `put` wrote. What is written to its arrays stays in this process."""
    with Path(path).open("rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    start = 8 + int.from_bytes(mapped[:8], "little")
    views = []
    for size in pickle.loads(mapped[8:start]):
        start = _aligned(start)
        views.append(mapped[start : start + size])
        start += size
    return pickle.loads(views[0], buffers=views[1:])


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNED) * _ALIGNED
