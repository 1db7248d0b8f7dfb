"""A checkpoint on the hub, looked at without its weights: its JSON files, and the headers of its weights."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.download import hub_error, hub_file, is_hub_id, resolve_checkpoint
from toolkit.checkpoint.gguf import gguf_model, split_set
from toolkit.checkpoint.gguf_header import parse_gguf_header
from toolkit.checkpoint.gguf_names import ROPE_FREQS
from toolkit.checkpoint.opened import Checkpoint, found_checkpoint, gguf_checkpoint, open_checkpoint
from toolkit.checkpoint.safetensors import TensorRef, header_length, parse_header
from toolkit.checkpoint.scan import Rows
from toolkit.checkpoint.weights import FileWeights, Origin, find_tensors, weight_files
from toolkit.checkpoint.which_tensors import refuse_adapter
from toolkit.checkpoint.widen import widen
from toolkit.errors import CheckpointError

# What most headers fit into.
_FIRST_BYTES: Final = 1 << 17
# A GGUF header holds a vocabulary: some megabytes.
_GGUF_BYTES: Final = 2 << 20


class HeadersAlone(FileWeights):
    """Tensors whose names, shapes and dtypes are known and whose numbers are still on the hub: to read one is an error.

    `sizes` has the bytes of each file.
    """

    def __init__(self, place: str, refs: dict[str, TensorRef], sizes: dict[Path, int]) -> None:
        super().__init__(refs, list(sizes))
        self._place, self._sizes = place, sizes

    def scan(self, chunk_bytes: int) -> Iterator[Rows]:
        """Raises CheckpointError, for no weight is here."""
        self._refuse()

    def decode(self, rows: Rows, start: int, stop: int) -> NDArray[np.float32]:
        """Raises CheckpointError, for no weight is here."""
        self._refuse()

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Raises CheckpointError, for no weight is here."""
        self._refuse()

    def identity(self) -> tuple[Origin, ...]:
        """Name and size of each file."""
        return tuple(Origin(path.name, bytes=self._sizes[path]) for path in self.files())

    def digests(self) -> tuple[Origin, ...]:
        """As `identity`: what was not downloaded was not hashed."""
        return self.identity()

    def _refuse(self) -> NoReturn:
        raise CheckpointError(f"of {self._place} the headers alone are here, no weights: open it without headers alone")


def open_headers(place: str, revision: str | None = None) -> Checkpoint:
    """Opens a checkpoint as far as headers go, checked as if it were here; a hub id's weights are not downloaded.

    What is whole on this machine, a folder or a hub id that was downloaded before, is opened as it is. Raises
    CheckpointError for what is incomplete, damaged or no checkpoint.
    """
    if on_hub := hub_file(place):
        return _open_gguf_headers(place, *on_hub, revision)
    folder = resolve_checkpoint(place, revision, weights=False)
    if not is_hub_id(place) or all(file.is_file() for file in weight_files(folder)):
        return open_checkpoint(folder)
    refuse_adapter(folder)
    config = read_config(folder)
    sizes: dict[Path, int] = {}

    def read(path: Path) -> dict[str, TensorRef]:
        try:
            refs, sizes[path] = _remote_header(place, folder, path)
        except CheckpointError:
            raise
        except Exception as problem:  # the client's errors have no common root short of Exception
            raise hub_error(place, revision, problem) from None
        return refs

    found = find_tensors(folder, config, read)
    return found_checkpoint(folder, config, found, HeadersAlone(place, found.refs, sizes), sum(sizes.values()))


def _open_gguf_headers(place: str, repository: str, file: str, revision: str | None) -> Checkpoint:
    """The same for a GGUF file, or the set that it is of: its vocabulary is in its header, so some megabytes."""
    try:
        return open_checkpoint(_cached(repository, file, revision))
    except FileNotFoundError:
        pass
    ranges: list[_RemoteFile] = []
    headers = []
    try:
        for path in split_set(Path(file)):
            remote = _RemoteFile(repository, path, revision)
            ranges.append(remote)
            headers.append(parse_gguf_header(io.BufferedReader(remote, _GGUF_BYTES), remote.size, path))
    except CheckpointError:
        raise
    except Exception as problem:  # the client's errors have no common root short of Exception
        raise hub_error(place, revision, problem) from None
    sizes = {remote.path: remote.size for remote in ranges}
    model = gguf_model(Path(file), headers, lambda refs: _GgufHeadersAlone(place, refs, sizes, ranges))
    return gguf_checkpoint(model, download_bytes=sum(sizes.values()))


def _cached(repository: str, file: str, revision: str | None) -> Path:
    """The path of a file that was downloaded before, its whole set with it. Raises FileNotFoundError otherwise."""
    from huggingface_hub import try_to_load_from_cache

    found = [
        try_to_load_from_cache(repository, path.as_posix(), revision=revision or "main")
        for path in split_set(Path(file))
    ]
    if not all(isinstance(path, str) for path in found):
        raise FileNotFoundError(file)
    first = Path(str(found[0]))
    return first.with_name(Path(file).name)


class _RemoteFile(io.RawIOBase):
    """A file on the hub, read by range requests from its beginning on; `size` is known from the start."""

    def __init__(self, repository: str, path: Path, revision: str | None) -> None:
        from huggingface_hub import hf_hub_url

        self.path, self._at = path, 0
        self._url = hf_hub_url(repository, path.as_posix(), revision=revision)
        response = _get(self._url, 0, 1)
        self.size = int(response.headers.get("Content-Range", f"/{len(response.content)}").rsplit("/", 1)[-1])

    def readable(self) -> bool:
        """Returns true, which is what `io.BufferedReader` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer with the next bytes, and returns how many there were."""
        content = self.bytes(self._at, min(len(buffer), self.size - self._at))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def bytes(self, start: int, count: int) -> bytes:
        """Reads `count` bytes of the file from `start` on."""
        content: bytes = _get(self._url, start, count).content[:count] if count else b""
        return content


class _GgufHeadersAlone(HeadersAlone):
    """Headers of GGUF files; the one tensor that belongs to the config, RoPE's divisors, is fetched when it is read."""

    def __init__(
        self, place: str, refs: dict[str, TensorRef], sizes: dict[Path, int], files: Sequence[_RemoteFile]
    ) -> None:
        super().__init__(place, refs, sizes)
        self._remote = {remote.path: remote for remote in files}

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of the divisors; raises CheckpointError for a weight, which is not here."""
        if name != ROPE_FREQS:
            return super().read_rows(name, start, stop)
        ref = self._refs[name]
        raw = np.frombuffer(self._remote[ref.path].bytes(ref.offset, ref.nbytes), np.uint8)
        return widen(raw, ref.dtype)[start:stop]


def _remote_header(place: str, folder: Path, path: Path) -> tuple[dict[str, TensorRef], int]:
    """A file's tensors and its size, by range requests at the commit whose JSON files lie in `folder`."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(place, path.name, revision=folder.name)
    response = _get(url, 0, _FIRST_BYTES)
    content: bytes = response.content
    size = int(response.headers.get("Content-Range", f"/{len(content)}").rsplit("/", 1)[-1])
    length = header_length(content[:8], size, path)
    text = content[8 : 8 + length]
    if len(text) < length:
        text = _get(url, 8, length).content[:length]
    if len(text) < length:
        raise CheckpointError(f"{path.name} of {place} ended after {len(text)} of its header's {length} bytes")
    return parse_header(text, path, size), size


def _get(url: str, start: int, count: int) -> Any:
    """The response with `count` bytes of a file from `start` on, or as many as there are."""
    # These are exported in every release, but not in the way that type checkers ask for.
    hub: Any = import_module("huggingface_hub.utils")
    headers = {**hub.build_hf_headers(), "Range": f"bytes={start}-{start + count - 1}"}
    response = hub.get_session().get(url, headers=headers)
    hub.hf_raise_for_status(response)
    return response
