"""A GGUF file, or a split set of them, as a checkpoint: its config, its tensors, and a folder with its side files.

What the metadata says is written as the files that a folder in Hugging Face layout has, so that everything which reads
a checkpoint reads this one; the weights stay where they are, and are dequantized as their rows stream by.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.checkpoint.config import ModelConfig, parse_config
from toolkit.checkpoint.gguf_config import config_of, generation_of
from toolkit.checkpoint.gguf_header import GgufHeader, read_gguf_header
from toolkit.checkpoint.gguf_metadata import Metadata
from toolkit.checkpoint.gguf_names import ROPE_FREQS, checkpoint_name, rotated_heads, to_halves
from toolkit.checkpoint.gguf_tokenizer import tokenizer_config_of, tokenizer_of
from toolkit.checkpoint.gguf_types import FILE_TYPES, TYPE_BY_NAME
from toolkit.checkpoint.safetensors import TensorRef
from toolkit.checkpoint.scan import Rows, whole_tensors
from toolkit.checkpoint.side_files import GENERATION_FILE, TOKENIZER_CONFIG_FILE
from toolkit.checkpoint.stored_as import StoredAs
from toolkit.checkpoint.weights import FileWeights, WeightSource, expected_refs
from toolkit.errors import CheckpointError
from toolkit.files import write_json

Floats = NDArray[np.float32]
SUFFIX: Final = ".gguf"
_SPLIT: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF file holds; `side` are the contents of the JSON files beside its weights, config.json among them."""

    config: ModelConfig
    source: GgufWeights
    side: Mapping[str, Any]
    stored_as: StoredAs

    def side_folder(self, owner: WeightSource) -> Path:
        """A temporary folder with the side files, which goes when `owner` does, or this process ends."""
        folder = Path(tempfile.mkdtemp(prefix="toolkit-gguf-"))
        weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
        for name, value in self.side.items():
            write_json(folder / name, value)
        return folder


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file, there or not."""
    return path.suffix.lower() == SUFFIX


def open_gguf(path: Path) -> GgufModel:
    """Opens a file, or the split set that it is one of, every header read and checked.

    Raises CheckpointError for what is damaged or incomplete, UnsupportedError for an architecture, a tensor type or a
    tokenizer that is not read.
    """
    headers = [read_gguf_header(file) for file in split_set(path)]
    return gguf_model(path, headers, lambda refs: FileWeights(refs, [header.path for header in headers]))


def gguf_model(
    path: Path, headers: Sequence[GgufHeader], stored: Callable[[dict[str, TensorRef]], FileWeights]
) -> GgufModel:
    """What `open_gguf` returns, of headers that were read already; `stored` reads tensors, wherever they are."""
    tensors = _joined(headers)
    read = Metadata(headers[0].metadata, path)
    divisors = tensors.get(ROPE_FREQS)
    raw = config_of(read, tensors, None if divisors is None else stored(tensors).read(ROPE_FREQS).reshape(-1))
    config = parse_config(raw, path)
    found = {}
    for given, ref in tensors.items():
        if given != ROPE_FREQS:
            name = checkpoint_name(given)
            found[name] = replace(ref, name=name)
    refs = expected_refs(found, config, path, TYPE_BY_NAME)
    side = {
        names.CONFIG_FILE: raw,
        GENERATION_FILE: generation_of(read),
        names.TOKENIZER_FILE: tokenizer_of(read),
        TOKENIZER_CONFIG_FILE: tokenizer_config_of(read),
    }
    source = GgufWeights(stored(refs), config)
    return GgufModel(config, source, side, _stored_as(read, refs))


def split_set(path: Path) -> list[Path]:
    """The files of a set, in order, by the name of any one of them; a file that is whole is its own set."""
    found = _SPLIT.fullmatch(path.name)
    if not found:
        return [path]
    count = int(found["count"])
    return [path.with_name(f"{found['stem']}-{k:05d}-of-{count:05d}{SUFFIX}") for k in range(1, count + 1)]


def _joined(headers: Sequence[GgufHeader]) -> dict[str, TensorRef]:
    """Every tensor of a set. Raises CheckpointError for a file that is not its part, or a tensor in two of them."""
    found: dict[str, TensorRef] = {}
    for k, header in enumerate(headers):
        here, said = (k, len(headers)), header.metadata
        named = said.get("split.no", here[0]), said.get("split.count", here[1])
        if named not in (here, (0, 0)):
            raise CheckpointError(
                f"{header.path} says it is part {named[0]} of {named[1]} from 0, expected {here[0]} of {here[1]} by "
                "its name: keep the names that the set was published with"
            )
        for name in header.tensors.keys() & found.keys():
            raise CheckpointError(f"{name} stands in {found[name].path.name} and in {header.path.name}: expected one")
        found |= header.tensors
    return found


def _stored_as(read: Metadata, refs: Mapping[str, TensorRef]) -> StoredAs:
    kinds = Counter(ref.dtype for ref in refs.values())
    weights = sum(int(np.prod(ref.shape)) for ref in refs.values())
    number = read.count("general.file_type", least=0) if read.has("general.file_type") else -1
    file_type = FILE_TYPES.get(number & 1023 if number >= 0 else number, kinds.most_common(1)[0][0])
    bits = 8 * sum(ref.nbytes for ref in refs.values()) / weights
    return StoredAs(file_type, round(bits, 3), dict(kinds.most_common()))


class GgufWeights:
    """A `WeightSource` over the tensors of GGUF files: rows of q_proj and k_proj in Hugging Face's order.

    Where llama.cpp has pairs of them beside each other, rows change places within a head; such matrices are scanned as
    one piece each.
    """

    def __init__(self, stored: FileWeights, config: ModelConfig) -> None:
        heads = {name: rotated_heads(config, name) for name in stored.names()}
        self._stored, self._head_dim = stored, config.head_dim
        self._turned = {name: count for name, count in heads.items() if count}
        self.names, self.files, self.dtype = stored.names, stored.files, stored.dtype
        self.identity, self.digests, self.bytes_read = stored.identity, stored.digests, stored.bytes_read

    def read(self, name: str) -> Floats:
        """Reads a whole tensor as float32."""
        values = self._stored.read(name)
        return to_halves(values, self._turned[name]) if name in self._turned else values

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows [start, stop) of a tensor as float32."""
        return self._rows(name, start, stop, lambda a, b: self._stored.read_rows(name, a, b))

    def scan(self, chunk_bytes: int) -> Iterator[Rows]:
        """Every row once, in file order."""
        return whole_tensors(self._stored.scan(chunk_bytes), self._turned.__contains__)

    def decode(self, rows: Rows, start: int, stop: int) -> Floats:
        """Some of the rows that `scan` yielded, as float32."""
        return self._rows(rows.name, start, stop, lambda a, b: self._stored.decode(rows, a, b))

    def _rows(self, name: str, start: int, stop: int, read: Callable[[int, int], Floats]) -> Floats:
        """Rows [start, stop), of a turned tensor out of the whole heads that they belong to."""
        if name not in self._turned or start == stop:
            return read(start, stop)
        first, last = start // self._head_dim, -(-stop // self._head_dim)
        whole = to_halves(read(first * self._head_dim, last * self._head_dim), last - first)
        return whole[start - first * self._head_dim : stop - first * self._head_dim]
