"""GGUF headers, read and bounded before a single weight byte is.

Format: the magic `GGUF`, a version, counts of tensors and of metadata, the metadata as typed pairs, a row for each
tensor (name, dimensions, type, offset), and the data, which begins at the next multiple of `general.alignment`. All of
it is little-endian; dimensions stand innermost first (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import io
import math
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from toolkit.checkpoint.gguf_types import TENSOR_TYPES
from toolkit.checkpoint.safetensors import TensorRef
from toolkit.errors import CheckpointError
from toolkit.files import LFS_POINTER

Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]

MAX_HEADER_BYTES: Final = 200_000_000
_VERSIONS: Final = (2, 3)
# The largest published files have some two thousand tensors and a hundred keys.
_MOST_TENSORS: Final = 1 << 16
_MOST_KEYS: Final = 1 << 14
# Ten times the largest vocabulary's merges.
_MOST_VALUES: Final = 1 << 22
_LONGEST_NAME: Final = 256
_BUFFER: Final = 1 << 20
_MOST_DIMENSIONS: Final = 4
_ALIGNMENT: Final = 32
_STRING: Final = 8
_ARRAY: Final = 9
_BOOL: Final = 7
# By the number of a value's type, what `struct` calls it.
_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufHeader:
    """What one file says before its data: metadata by key, and each tensor by the file's name of it."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorRef]


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a file on this machine. Raises CheckpointError if the file is not whole and well-formed."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is no regular file")
        with path.open("rb", buffering=_BUFFER) as file:
            return parse_gguf_header(file, status.st_size, path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, download it again") from None
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror}") from None


def parse_gguf_header(file: BinaryIO | io.BufferedReader, size: int, path: Path) -> GgufHeader:
    """The header that `file` begins with, of a file of `size` bytes. Raises CheckpointError if the two do not fit."""
    read = _Bounded(file, size, path)
    _check_kind(read, path)
    tensors = read.count("tensors", _MOST_TENSORS)
    keys = read.count("keys of metadata", _MOST_KEYS)
    metadata: dict[str, Value] = {}
    for _ in range(keys):
        key = read.text("a key", _LONGEST_NAME)
        if key in metadata:
            raise CheckpointError(f"{path}: the metadata's key {key!r} stands twice")
        metadata[key] = _value(read, read.number("I"), key)
    rows = [_tensor_row(read, path) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {str(alignment)[:40]}, expected a power of two")
    start = _aligned(read.position, alignment)
    refs: dict[str, TensorRef] = {}
    for name, shape, type_number, offset in rows:
        if name in refs:
            raise CheckpointError(f"{path}: {name} stands twice among its tensors")
        refs[name] = _ref(name, shape, type_number, start + offset, path)
    _check_layout(refs, start, alignment, size, path)
    return GgufHeader(path, metadata, refs)


class _Bounded:
    """Reads that stay inside the file and below the most that a header may have; each checks before it allocates."""

    def __init__(self, file: BinaryIO | io.BufferedReader, size: int, path: Path) -> None:
        self._file, self._path = file, path
        self._end, self._size = min(size, MAX_HEADER_BYTES), size
        self.position = 0

    def take(self, nbytes: int) -> bytes:
        """The next bytes; raises CheckpointError if the file, or what a header may have, ends before."""
        if nbytes > self._end - self.position:
            raise CheckpointError(
                f"{self._path} ends inside its header, at {self._end} of {self._size} bytes: truncated or damaged, "
                "download it again"
            )
        taken = self._file.read(nbytes)
        if len(taken) < nbytes:
            raise CheckpointError(f"{self._path} ended at {self.position + len(taken)}: download it again")
        self.position += nbytes
        return taken

    def number(self, kind: str) -> int:
        """Reads one whole number, little-endian, of the `kind` that `struct` calls so."""
        (value,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))
        return int(value)

    def count(self, of: str, most: int) -> int:
        """A count of at most `most`, and no more than the bytes that are left."""
        value = self.number("Q")
        if value > min(most, self._end - self.position):
            raise CheckpointError(f"{self._path} claims {value} {of}, expected at most {most} in {self._size} bytes")
        return value

    def text(self, what: str, longest: int = MAX_HEADER_BYTES) -> str:
        """A string: its length, then UTF-8."""
        length = self.count(f"bytes of {what}", longest)
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self._path}: {what} is not text in UTF-8, at {self.position}") from None

    def texts(self, count: int, what: str) -> list[str]:
        """Many strings, one after the other: vocabularies have hundreds of thousands."""
        read, length_of, left, found = self._file.read, struct.Struct("<Q").unpack, self._end - self.position, []
        try:
            for _ in range(count):
                (length,) = length_of(read(8))
                if length > left:
                    break
                found.append(read(length).decode("utf-8"))
                left -= 8 + length
        except struct.error:
            left = -1
        except UnicodeDecodeError:
            raise CheckpointError(f"{self._path}: {what} holds what is not text in UTF-8") from None
        if left < 0 or len(found) < count:
            raise CheckpointError(f"{self._path} ends inside {what}, after {len(found)} of {count} texts: truncated")
        self.position = self._end - left
        return found


def _check_kind(read: _Bounded, path: Path) -> None:
    magic = read.take(4)
    if magic == LFS_POINTER[:4]:
        raise CheckpointError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder")
    if magic != b"GGUF":
        raise CheckpointError(f"{path} begins with {magic!r}, expected b'GGUF': not a GGUF file")
    version = read.number("I")
    if version in _VERSIONS:
        return
    if version >> 16 and int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *_VERSIONS):
        raise CheckpointError(f"{path} is big-endian, expected a little-endian file: convert the original again")
    raise CheckpointError(
        f"{path} is of version {version} of GGUF, expected {' or '.join(map(str, _VERSIONS))}: convert the original "
        "again with a llama.cpp of this year"
    )


def _value(read: _Bounded, kind: int, key: str) -> Value:
    """One value of the metadata: a number, a flag, a text, or a list of one of them."""
    if kind == _STRING:
        return read.text(key[:80])
    if kind != _ARRAY:
        return _numbers(read, kind, 1, key)[0]
    inner = read.number("I")
    if inner == _STRING:
        return read.texts(read.count(f"texts in {key[:80]}", _MOST_VALUES), key[:80])
    return _numbers(read, inner, read.count(f"values in {key[:80]}", _MOST_VALUES), key)


def _numbers(read: _Bounded, kind: int, count: int, key: str) -> list[int] | list[float] | list[bool]:
    if kind not in _NUMBERS:
        word = "a list of lists" if kind == _ARRAY else f"of the unknown type {kind}"
        raise CheckpointError(f"{read._path}: {key[:80]} is {word}: newer than this toolkit, or damaged")
    letter = _NUMBERS[kind]
    values = list(struct.unpack(f"<{count}{letter}", read.take(count * struct.calcsize(f"<{letter}"))))
    if kind != _BOOL:
        return values
    if any(value > 1 for value in values):
        raise CheckpointError(f"{read._path}: {key[:80]} holds a flag that is neither 0 nor 1")
    return [bool(value) for value in values]


def _tensor_row(read: _Bounded, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape (outermost first), number of the type, and offset from where the data begins."""
    name = read.text("a tensor's name", _LONGEST_NAME)
    dimensions = read.number("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise CheckpointError(f"{path}: {name} has {dimensions} dimensions, expected 1 to {_MOST_DIMENSIONS}")
    shape = tuple(read.number("Q") for _ in range(dimensions))[::-1]
    if not all(0 < length < 1 << 48 for length in shape) or math.prod(shape) >= 1 << 48:
        raise CheckpointError(f"{path}: {name} has the shape {list(shape)}, which cannot be")
    return name, shape, read.number("I"), read.number("Q")


def _ref(name: str, shape: tuple[int, ...], type_number: int, offset: int, path: Path) -> TensorRef:
    kind = TENSOR_TYPES.get(type_number)
    if kind is None:
        known = ", ".join(kind.name for kind in TENSOR_TYPES.values())
        raise CheckpointError(f"{path}: {name} is of the tensor type {type_number}, expected one of {known}")
    if shape[-1] % kind.block:
        raise CheckpointError(f"{path}: {name} has rows of {shape[-1]}, and {kind.name} has blocks of {kind.block}")
    if len(shape) == 1 and kind.block > 1:
        raise CheckpointError(f"{path}: {name} is one row in blocks of {kind.name}, which no converter writes: damaged")
    return TensorRef(name, kind.name, shape, path, offset, math.prod(shape) // kind.block * kind.nbytes)


def _check_layout(refs: Mapping[str, TensorRef], start: int, alignment: int, size: int, path: Path) -> None:
    """The data must be one run of tensors, each at the next multiple of the alignment, and lie inside the file."""
    end = start if refs else 0
    for ref in sorted(refs.values(), key=lambda r: (r.offset, r.nbytes)):
        if ref.offset != _aligned(end, alignment):
            raise CheckpointError(
                f"{path}: the bytes of {ref.name} start at {ref.offset}, expected {_aligned(end, alignment)}"
            )
        end = ref.offset + ref.nbytes
    if end > size:
        raise CheckpointError(f"{path} is truncated: {size} bytes, expected {end}: download it again")


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
