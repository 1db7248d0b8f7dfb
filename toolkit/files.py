"""Files that are whole or not there: written beside their name and renamed, read with a bound, hashed."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from toolkit.errors import MachineError, ToolkitError
from toolkit.typed_json import from_json, to_json

Kind = TypeVar("Kind")
_MAX_STATE_BYTES: Final = 256 << 20

# How the placeholder begins that git keeps for a large file (git-lfs' specification, version 1).
LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"
# What a file's name ends in until it is whole; a kill may leave one so.
BEING_WRITTEN: Final = ".new"
_DIGEST: Final = "digest"
# No space, a quota, the largest file there may be.
FULL_DISK: Final = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})


@dataclass(frozen=True)
class FileEntry:
    """One file of a bundle: its name there, its size in bytes, and its SHA-256 in hexadecimal."""

    name: str
    bytes: int
    sha256: str


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write under; the file becomes `path` when the block ends, and goes if it raises.

    Whoever looks at `path` meanwhile, or after a kill, finds the old file or the new one, never half of either.
    """
    fresh = path.with_name(path.name + BEING_WRITTEN)
    # What a kill left may be another name of a file that must not be written to.
    fresh.unlink(missing_ok=True)
    try:
        yield fresh
        # A name that is on the disk before its bytes are would stand for zeros after a power cut.
        with fresh.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


@contextmanager
def disk_errors(*places: Path) -> Iterator[None]:
    """Raises a ToolkitError of one line for whatever the system refuses while bundles are written at `places`."""
    try:
        yield
    except OSError as problem:
        raise disk_error(problem, *places) from None


def disk_error(problem: OSError, *places: Path) -> ToolkitError:
    """What to say of a call to the system that failed while bundles were written at `places`: a full disk, a place that
    cannot be written, or another file, which could not be read."""
    named = Path(os.fsdecode(problem.filename)) if isinstance(problem.filename, str | bytes) else None
    reason = problem.strerror or str(problem) or type(problem).__name__
    if problem.errno in FULL_DISK:
        return MachineError(f"{named or places[0]} cannot be written: {reason}; free space and run again")
    if named is None or any(_belongs(named, place) for place in places):
        closed = problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        hint = "make it writable, or name another place" if closed else "name another place"
        return MachineError(f"{named or places[0]} cannot be written: {reason}; {hint}")
    return MachineError(f"{named} cannot be read or written: {reason}")


def check_writable(folder: Path) -> None:
    """Raises MachineError for a folder that files cannot be written into, before work is done for them."""
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise MachineError(f"{folder} cannot be written: it is read-only; make it writable, or name another place")


def _belongs(path: Path, place: Path) -> bool:
    """Whether a path is a bundle's place, a work folder beside it, or in one of them."""
    return any(above.parent == place.parent and place.name in above.name for above in (path, *path.parents))


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 with its line ends as they are, whole or not at all."""
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: object) -> None:
    """Writes `value` as indented JSON, whole or not at all. Raises ValueError for NaN and infinity."""
    write_text(path, json_text(value))


def with_digest(value: object) -> dict[str, Any]:
    """`value` with the SHA-256 of all its other keys as `digest`, so that a change made to the file is seen."""
    if not isinstance(value, Mapping):
        raise TypeError(f"a JSON object has a digest, no {type(value).__name__}")
    rest = {str(key): entry for key, entry in value.items() if key != _DIGEST}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**rest, _DIGEST: hashlib.sha256(text.encode("utf-8")).hexdigest()}


def digest_fits(raw: Mapping[str, Any]) -> bool:
    """Whether what was read is what `with_digest` made; files of before there was a digest have none, and fit."""
    try:
        return _DIGEST not in raw or with_digest(raw)[_DIGEST] == raw[_DIGEST]
    except ValueError:  # NaN or infinity, which are never written
        return False


def json_text(value: object) -> str:
    """`value` as indented JSON that ends with a line end; raises ValueError for NaN and infinity."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path, max_bytes: int, error: type[ToolkitError], expected: str) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises `error` with the file's name if it cannot be read; `expected` says what a missing one should have been.
    """
    try:
        text = _read_bounded(path, max_bytes, error)
        value = json.loads(text.decode("utf-8"))
    except FileNotFoundError:
        raise error(f"{path} is missing: {expected}") from None
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from None
    except UnicodeDecodeError:
        raise error(f"{path} is not valid JSON: it is no text in UTF-8, save it as that") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is not valid JSON: {str(problem)[:120]}") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__}, expected an object")
    # Only an escape brings one in, and most files have none.
    if b"\\ud" in text.lower() and not is_unicode(value):
        raise error(f"{path} holds half of a surrogate pair, an escape such as \\ud800, which is no text")
    return value


def is_there(path: Path, error: type[ToolkitError]) -> bool:
    """Whether a file is there. Raises `error` for a link to one that is gone, as half a download leaves them."""
    if path.exists():
        return True
    if path.is_symlink():
        raise error(f"{path} is a link to a file that is gone: download it again, or copy what it links to")
    return False


def is_unicode(value: object) -> bool:
    """Whether every text in a value can be written down: halves of surrogate pairs cannot."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except (UnicodeEncodeError, TypeError, ValueError):
        return False
    return True


def write_state(path: Path, value: object) -> None:
    """Writes where a piece of work stands, a dataclass, with a digest of what it says."""
    write_json(path, with_digest(to_json(value)))


def read_state(kind: type[Kind], path: Path) -> Kind | None:
    """What `write_state` wrote; None where there is nothing, or it is not as it was written: the work is then done
    again."""
    try:
        raw = read_json(path, _MAX_STATE_BYTES, ToolkitError, "the work has not begun")
        return from_json(kind, raw, str(path)) if _DIGEST in raw and digest_fits(raw) else None
    except (ToolkitError, ValueError):
        return None


def read_text(path: Path, max_bytes: int, error: type[ToolkitError], *, mark_too: bool = False) -> str:
    """The text of a file in UTF-8 that is not empty and of bounded size; `mark_too` takes one that begins with a byte
    order mark, and leaves it out. Raises `error` with the file's name."""
    try:
        return _read_bounded(path, max_bytes, error, mark_too).decode("utf-8-sig" if mark_too else "utf-8")
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from None
    except UnicodeDecodeError:
        raise error(f"{path} is not text in UTF-8") from None


def _read_bounded(path: Path, max_bytes: int, error: type[ToolkitError], mark_too: bool = False) -> bytes:
    """The content of a regular file of text; a pipe, a device or a placeholder for a file is an error of its own."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise error(f"{path} is no regular file")
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise error(f"{path} has more than {max_bytes} bytes, expected at most so many: not a file of this kind")
    if not content:
        raise error(f"{path} is empty")
    if content.startswith(LFS_POINTER):
        raise error(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder")
    if content.startswith(codecs.BOM_UTF8) and not mark_too:
        raise error(f"{path} begins with a byte order mark, which programs stumble over: save it as UTF-8 without one")
    return content


def link_or_copy(path: Path, other: Path) -> None:
    """Gives a file a second name, or copies it where the file system has no hard links or is another."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal. Raises OSError for a pipe or a device, which may have no end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path, sha256: str | None = None) -> FileEntry:
    """Name, size and SHA-256 of a file, the last computed unless it is given."""
    return FileEntry(path.name, path.stat().st_size, sha256 or file_sha256(path))
