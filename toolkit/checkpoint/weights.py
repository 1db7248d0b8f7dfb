"""A checkpoint's tensors: found, checked against the config, and read by rows as float32.

Headers first: `open_weights` returns only when every tensor the config calls for exists once, with the shape and
a float dtype it should have. After that `read_rows` costs one positioned read and one widening pass, and `scan` reads
every file once from end to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.checkpoint.anatomy import describe
from toolkit.checkpoint.config import ModelConfig, read_checkpoint_json
from toolkit.checkpoint.safetensors import ITEM_BYTES, TensorRef, read_header
from toolkit.checkpoint.scan import ReadBytes, Rows, read_exactly, scan_file
from toolkit.errors import CheckpointError, NonFiniteError
from toolkit.machine import fits_the_page_cache

_MAX_INDEX_BYTES: Final = 64 << 20
# Buffers old checkpoints carry that are computed, not learned.
_COMPUTED_SUFFIXES: Final = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")


@dataclass(frozen=True)
class Origin:
    """What tensors come from: a file by its name with its size, and its SHA-256 or time of change; or a seed."""

    name: str
    bytes: int | None = None
    sha256: str | None = None
    mtime_ns: int | None = None
    seed: int | None = None


class Tensors(Protocol):
    """Named tensors that can be read by rows; what a forward pass needs."""

    def names(self) -> list[str]:
        """Lists every tensor's name, in file order."""
        ...

    def read(self, name: str) -> NDArray[np.float32]:
        """Reads a whole tensor as float32."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of a tensor's first axis."""
        ...


class WeightSource(Tensors, Protocol):
    """A checkpoint's tensors. Every read goes to disk (or makes the numbers) anew."""

    def scan(self, chunk_bytes: int) -> Iterator[Rows]:
        """Every row of every tensor once, in file order, some `chunk_bytes` of the source at a time."""
        ...

    def decode(self, rows: Rows, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of those that `scan` yielded, on any thread."""
        ...

    def identity(self) -> tuple[Origin, ...]:
        """What the tensors come from, cheaply: two sources of the same identity hold the same numbers."""
        ...

    def digests(self) -> tuple[Origin, ...]:
        """What they come from, in full: name, bytes and SHA-256 of each file. Known once `scan` is through."""
        ...

    def bytes_read(self) -> int:
        """How many bytes of files every read so far took together, through whatever stands on this source."""
        ...


class SafetensorsWeights:
    """A `WeightSource` over the safetensors files of one folder."""

    def __init__(self, refs: dict[str, TensorRef], files: list[Path]) -> None:
        self._refs, self._files = refs, sorted(files)
        self._digests: dict[str, str] = {}
        self._read = ReadBytes()

    def names(self) -> list[str]:
        """Lists every tensor's name, in file order."""
        return sorted(self._refs, key=lambda name: (str(self._refs[name].path), self._refs[name].offset))

    def files(self) -> list[Path]:
        """The checkpoint's files, sorted by name, those of tensors that are not needed included."""
        return self._files

    def scan(self, chunk_bytes: int) -> Iterator[Rows]:
        """Every row once, in file order; afterwards `digests` is known."""
        direct = not fits_the_page_cache(sum(path.stat().st_size for path in self.files()))
        for path in self.files():
            refs = [ref for ref in self._refs.values() if ref.path == path]
            yield from scan_file(path, refs, chunk_bytes, direct, self._digests, self._read)

    def decode(self, rows: Rows, start: int, stop: int) -> NDArray[np.float32]:
        """Some of the rows as float32; raises NonFiniteError on NaN or infinity in them."""
        if rows.raw is None:
            return self.read_rows(rows.name, start, stop)
        ref = self._refs[rows.name]
        row_bytes = rows.raw.nbytes // (rows.stop - rows.start)
        raw = rows.raw[(start - rows.start) * row_bytes : (stop - rows.start) * row_bytes]
        values = widen(raw, ref.dtype)
        check_finite(values, rows.name)
        return values.reshape((stop - start, *ref.shape[1:]))

    def identity(self) -> tuple[Origin, ...]:
        """Name, size and time of change of each file."""
        stats = [(path.name, path.stat()) for path in self.files()]
        return tuple(Origin(name, stat.st_size, mtime_ns=stat.st_mtime_ns) for name, stat in stats)

    def digests(self) -> tuple[Origin, ...]:
        """Name, size and SHA-256 of each file, once `scan` is through."""
        return tuple(Origin(path.name, path.stat().st_size, self._digests[path.name]) for path in self.files())

    def bytes_read(self) -> int:
        """How many bytes of the files were read so far, headers not counted."""
        return self._read.total

    def dtype(self, name: str) -> str:
        """The stored dtype of a tensor: BF16, F16 or F32."""
        return self._refs[name].dtype

    def read(self, name: str) -> NDArray[np.float32]:
        """A whole tensor as float32; raises NonFiniteError if it holds NaN or infinity."""
        shape = self._refs[name].shape
        return self.read_rows(name, 0, shape[0] if shape else 1).reshape(shape)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows as float32, exact for every accepted dtype; raises NonFiniteError on NaN or infinity in them."""
        ref = self._refs[name]
        row_bytes = ref.nbytes // max(ref.shape[0], 1) if ref.shape else ref.nbytes
        raw = read_exactly(ref.path, ref.offset + start * row_bytes, (stop - start) * row_bytes, self._read)
        values = widen(raw, ref.dtype)
        check_finite(values, name)
        return values.reshape((stop - start, *ref.shape[1:]))


def widen(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """BF16, F16 or F32 bytes as a flat float32 array; every value is represented exactly."""
    if dtype == "F32":
        return raw.view("<f4").astype(np.float32, copy=False)
    if dtype == "F16":
        return raw.view("<f2").astype(np.float32)
    wide = np.left_shift(raw.view("<u2"), 16, dtype=np.uint32)
    return np.asarray(wide.view(np.float32))


def check_finite(values: NDArray[np.float32], name: str) -> None:
    """Raises NonFiniteError with the tensor and the count; one NaN or infinity makes the sum of squares one."""
    flat = values.reshape(-1)
    if np.isfinite(np.vdot(flat, flat)):
        return
    bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    if bad == 0:
        return
    raise NonFiniteError(f"{name} holds {bad} NaN or infinite values: the checkpoint is damaged, download it again")


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this config must hold, with its shape."""
    return describe(config).tensors


def parameter_count(config: ModelConfig) -> int:
    """How many numbers a checkpoint of this config holds."""
    return sum(math.prod(shape) for shape in expected_tensors(config).values())


def open_weights(folder: Path, config: ModelConfig) -> SafetensorsWeights:
    """The checkpoint's tensors, every header read and checked; raises CheckpointError naming what is wrong."""
    return SafetensorsWeights(find_tensors(folder, config, read_header), weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that a checkpoint's folder must have, by its index, whether or not they are there."""
    return [folder / file for file in sorted(set(_read_index(folder).values())) or [names.SAFETENSORS_FILE]]


def find_tensors(
    folder: Path, config: ModelConfig, read: Callable[[Path], dict[str, TensorRef]]
) -> dict[str, TensorRef]:
    """Each tensor the config calls for and where it lies; `read` gives the tensors of a file.

    Raises CheckpointError for what is missing, stands twice, is not called for, or has another shape.
    """
    found: dict[str, TensorRef] = {}
    weight_map = _read_index(folder)
    for file in weight_files(folder):
        refs = read(file)
        for name in refs.keys() & found.keys():
            raise CheckpointError(f"{name} stands in {found[name].path.name} and in {file.name}: expected one of them")
        found |= refs
    if weight_map and (missing := sorted(weight_map.keys() - found.keys())):
        raise CheckpointError(f"{missing[0]} is named by {names.SAFETENSORS_INDEX_FILE} but no shard holds it")
    expected = expected_tensors(config)
    if missing := sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors, the first is {missing[0]}: download it again")
    ignorable = {names.weight(names.LM_HEAD)} if config.tie_word_embeddings else set()
    extra = [n for n in found.keys() - expected.keys() - ignorable if not n.endswith(_COMPUTED_SUFFIXES)]
    if extra:
        raise CheckpointError(f"{folder} holds {len(extra)} tensors its config does not call for, such as {min(extra)}")
    for name, shape in expected.items():
        ref = found[name]
        if ref.shape != shape or ref.dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"{name} is {ref.dtype} {list(ref.shape)}, expected {'/'.join(ITEM_BYTES)} {list(shape)}"
            )
    return {name: found[name] for name in expected}


def _read_index(folder: Path) -> dict[str, str]:
    """`weight_map` of the shard index, empty for a single file; names may not leave the folder."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: name a checkpoint in Hugging Face layout")
    path = folder / names.SAFETENSORS_INDEX_FILE
    if not path.exists():
        if not (folder / names.SAFETENSORS_FILE).exists() and list(folder.glob("*.bin")):
            raise CheckpointError(f"{folder} holds .bin pickles, which are never loaded: convert to safetensors first")
        return {}
    weight_map = read_checkpoint_json(path, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or PurePosixPath(file).name != file or "\\" in file or ":" in file:
            raise CheckpointError(f"{path} names {file!r}: a shard must be a plain file name inside the folder")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {file!r}: only safetensors are loaded")
    return weight_map
