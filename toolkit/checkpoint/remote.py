"""A checkpoint on the hub, looked at without its weights: its JSON files, and the headers of its safetensors files."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.download import hub_error, is_hub_id, resolve_checkpoint
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.checkpoint.safetensors import TensorRef, header_length, parse_header
from toolkit.checkpoint.scan import Rows
from toolkit.checkpoint.side_files import read_side_files
from toolkit.checkpoint.weights import FileWeights, Origin, find_tensors, weight_files
from toolkit.errors import CheckpointError

# What most headers fit into.
_FIRST_BYTES: Final = 1 << 17


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
    folder = resolve_checkpoint(place, revision, weights=False)
    if not is_hub_id(place) or all(file.is_file() for file in weight_files(folder)):
        return open_checkpoint(folder)
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
    side = read_side_files(folder, config.vocab_size)
    source = HeadersAlone(place, found.refs, sizes)
    return Checkpoint(folder, config, source, False, side, download_bytes=sum(sizes.values()))


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
