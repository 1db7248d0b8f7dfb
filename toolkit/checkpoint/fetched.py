"""A checkpoint at a URL that fsspec reads: s3://, http://, a file in an archive. Its files are copied once."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final
from urllib.request import url2pathname

from toolkit.errors import CheckpointError, MachineError
from toolkit.files import replacing
from toolkit.machine import cache_folder

# One letter would be a drive of Windows.
_URL: Final = re.compile(r"[a-z][a-z0-9+.-]+(://|::).+", re.IGNORECASE)
_HERE: Final = ("file://", "local://")


def is_url(place: str) -> bool:
    """Whether a checkpoint is named by a URL, or by several of them chained as fsspec chains them."""
    return bool(_URL.fullmatch(place))


def local_path(place: str) -> str:
    """Returns the path that a file:// URL is, and anything else as it stands."""
    for scheme in _HERE:
        if place.lower().startswith(scheme):
            return url2pathname(place[len(scheme) :])
    return place


def fetched_folder(url: str, patterns: Sequence[str], weights: Callable[[Path], Sequence[Path]]) -> Path:
    """Copies a folder's files into the cache folder, those that match the patterns and then its `weights`, and returns
    where they lie. A file that lies there with the same size is not copied again.

    Raises CheckpointError for a URL that cannot be read, MachineError where fsspec lacks what reads it.
    """
    folder = cache_folder() / "checkpoints" / hashlib.sha256(url.encode("utf-8")).hexdigest()[:16]
    try:
        files, root = _opened(url)
        listed = {path[len(root) :].strip("/"): entry for path, entry in _entries(files, root).items()}
        side = [name for name in listed if any(fnmatchcase(name, pattern) for pattern in patterns)]
        _copy(files, listed, side, folder)
        _copy(files, listed, [path.name for path in weights(folder) if path.name in listed], folder)
    except (CheckpointError, MachineError):
        raise
    except Exception as problem:  # each file system of fsspec has errors of its own
        said = " ".join((str(problem) or type(problem).__name__).split())[:200]
        raise CheckpointError(f"{url} cannot be read: {said}") from None
    return folder


def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the folder in it."""
    from fsspec.core import url_to_fs

    try:
        files, root = url_to_fs(url)
    except ImportError as problem:
        raise MachineError(f"{url} needs another package: {problem}") from None
    except ValueError as problem:
        raise CheckpointError(f"{url} is no URL that fsspec reads: {problem}") from None
    return files, str(root)


def _entries(files: Any, root: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = files.find(root, maxdepth=2, detail=True)
    if not found:
        raise CheckpointError(f"{root or 'the folder'} holds no file: name a checkpoint in Hugging Face layout")
    return found


def _copy(files: Any, listed: dict[str, dict[str, Any]], names: Sequence[str], folder: Path) -> None:
    for name in names:
        path, entry = folder / name, listed[name]
        if path.is_file() and path.stat().st_size == entry.get("size"):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as fresh:
            files.get_file(entry["name"], str(fresh))
