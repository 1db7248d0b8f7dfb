"""Safetensors headers, read and bounded before a single weight byte is.

Format: 8 bytes little-endian header length, a JSON object `{name: {dtype, shape, data_offsets}}`, then the data.
Offsets are relative to the end of the header, without holes or overlaps, and end at the end of the file
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from toolkit.errors import CheckpointError
from toolkit.files import LFS_POINTER

MAX_HEADER_BYTES: Final = 100_000_000
# float64 is rounded to float32 as it is read: what is quantized has eight bits at most.
ITEM_BYTES: Final = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
_KNOWN_BYTES: Final = {
    **ITEM_BYTES,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor lies: `nbytes` little-endian row-major bytes from `offset` (absolute) in `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    def __reduce__(self) -> tuple[type[TensorRef], tuple[object, ...]]:
        """What another process is sent: it may stand in another folder."""
        return TensorRef, (self.name, self.dtype, self.shape, self.path.absolute(), self.offset, self.nbytes)


def read_header(path: Path) -> dict[str, TensorRef]:
    """Every tensor of one file, by name. Raises CheckpointError if the file is not whole and well-formed."""
    try:
        status = path.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is no regular file")
        with path.open("rb") as file:
            length = header_length(file.read(8), size, path)
            text = file.read(length)
    except FileNotFoundError:
        gone = "a link to a file that is gone" if path.is_symlink() else "missing: the checkpoint is incomplete"
        raise CheckpointError(f"{path} is {gone}, download it again") from None
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror}") from None
    return parse_header(text, path, size)


def header_length(prefix: bytes, size: int, path: Path) -> int:
    """The bytes of the header of a file that begins with `prefix` and has `size` bytes. Raises CheckpointError."""
    if prefix == LFS_POINTER[:8]:
        raise CheckpointError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder")
    if len(prefix) < 8:
        raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors file: download it again")
    if all(32 <= byte < 127 or byte in b"\r\n\t" for byte in prefix):
        raise CheckpointError(
            f"{path} is no safetensors file but a text that begins with {prefix.decode()!r}, a page or a message in "
            "its place: download it again"
        )
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path} claims a header of {length} bytes in a file of {size}: truncated or not safetensors"
        )
    return int(length)


def parse_header(text: bytes, path: Path, size: int) -> dict[str, TensorRef]:
    """Every tensor of a file of `size` bytes whose header is `text`. Raises CheckpointError if they do not fit."""
    start = 8 + len(text)
    refs = _parse_entries(text, path, start)
    end = _check_layout(refs, path, start)
    if end != size:
        word = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(f"{path} is {word}: {size} bytes, expected {end}: download it again")
    return refs


def _parse_entries(text: bytes, path: Path, start: int) -> dict[str, TensorRef]:
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as problem:
        raise CheckpointError(f"{path} has a corrupt header: {str(problem)[:120]}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a corrupt header: expected an object of tensors")
    return {name: _parse_entry(name, entry, path, start) for name, entry in header.items() if name != "__metadata__"}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _parse_entry(name: str, entry: object, path: Path, start: int) -> TensorRef:
    def whole(values: object) -> bool:
        return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in values)

    if not isinstance(entry, dict) or not whole(entry.get("shape")) or not whole(entry.get("data_offsets")):
        raise CheckpointError(f"{path}: the header entry of {name!r} is malformed")
    dtype, shape, offsets = entry.get("dtype"), tuple(entry["shape"]), entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _KNOWN_BYTES:
        raise CheckpointError(f"{path}: {name} has dtype {str(dtype)[:40]!r}, expected one of {', '.join(ITEM_BYTES)}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _KNOWN_BYTES[dtype]:
        raise CheckpointError(f"{path}: {name} of shape {list(shape)} {dtype} does not fit its offsets {offsets}")
    return TensorRef(name, dtype, shape, path, start + offsets[0], offsets[1] - offsets[0])


def _check_layout(refs: dict[str, TensorRef], path: Path, start: int) -> int:
    """The data must be one run without holes or overlaps; returns where it ends."""
    end = start
    for ref in sorted(refs.values(), key=lambda r: (r.offset, r.nbytes)):
        if ref.offset != end:
            raise CheckpointError(f"{path}: the bytes of {ref.name} start at {ref.offset}, expected {end}")
        end += ref.nbytes
    return end
