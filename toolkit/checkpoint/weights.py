"""A checkpoint's tensors: found, checked against the config, and read by rows as float32.

Headers first: `open_weights` returns only when every tensor the config calls for exists once, with the shape and
a float dtype it should have. After that `read_rows` costs one positioned read and one widening pass, and `scan` reads
every file once from end to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.checkpoint.anatomy import decoder_of, stored_tensors
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.families import FAMILIES
from toolkit.checkpoint.misfits import is_beyond, not_called_for, other_shape
from toolkit.checkpoint.mtp import tensors_meant
from toolkit.checkpoint.other_formats import refuse_integers, refuse_quantized
from toolkit.checkpoint.quantized import Dequantizer
from toolkit.checkpoint.quantized_config import read_quantization
from toolkit.checkpoint.quantized_packing import Coded
from toolkit.checkpoint.quantized_tensors import CODES, coded_tensors, stored_as
from toolkit.checkpoint.safetensors import ITEM_BYTES, TensorRef, read_header
from toolkit.checkpoint.scan import ReadBytes, Rows, read_exactly, scan_file, whole_tensors
from toolkit.checkpoint.stored_as import StoredAs
from toolkit.checkpoint.which_tensors import ChosenFiles, choose_files, module_tensors, of_the_decoder
from toolkit.checkpoint.widen import check_finite
from toolkit.errors import CheckpointError
from toolkit.files import file_sha256
from toolkit.machine import fits_the_page_cache

# A head is compared with its embedding in pieces of so many numbers.
_COMPARED_AT_ONCE: Final = 1 << 21
# Buffers old checkpoints carry that are computed, not learned.
_COMPUTED_SUFFIXES: Final = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")
# What a decoder's tensors begin with; others are heads and towers beside it. Scales are those of an 8-bit cache.
_DECODERS: Final = ("model.", "lm_head.")
_CACHE_SCALES: Final = (".k_scale", ".v_scale", ".q_scale", ".prob_scale")


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
        """What they come from, in full: name, bytes and SHA-256 of each file, which `scan` finds on its way."""
        ...

    def bytes_read(self) -> int:
        """How many bytes of files every read so far took together, through whatever stands on this source."""
        ...


class FileWeights:
    """A `WeightSource` over files, safetensors or GGUF; `notes` say which of a folder's were chosen, and how. Tensors
    that are `coded` are dequantized as their rows are read."""

    def __init__(
        self,
        refs: dict[str, TensorRef],
        files: list[Path],
        notes: tuple[str, ...] = (),
        coded: Mapping[str, Coded] | None = None,
    ) -> None:
        self._refs, self._files, self.notes = refs, sorted(files), notes
        self._digests: dict[str, str] = {}
        self._read = ReadBytes()
        self._coded = coded or {}
        self._dequantizer = Dequantizer(self._coded, self._read)

    def __reduce__(self) -> tuple[Callable[..., FileWeights], tuple[object, ...]]:
        """What another process is sent: where the tensors lie, none of their bytes."""
        return FileWeights, (self._refs, [path.absolute() for path in self._files], self.notes, self._coded)

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
            stored = scan_file(path, refs, chunk_bytes, direct, self._digests, self._read)
            yield from whole_tensors(stored, self._dequantizer.by_columns)

    def decode(self, rows: Rows, start: int, stop: int) -> NDArray[np.float32]:
        """Some of the rows as float32; raises NonFiniteError on NaN or infinity in them."""
        if rows.raw is None:
            return self.read_rows(rows.name, start, stop)
        ref = self._refs[rows.name]
        row_bytes = rows.raw.nbytes // (rows.stop - rows.start)
        raw = rows.raw[(start - rows.start) * row_bytes : (stop - rows.start) * row_bytes]
        return self._floats(ref, rows.raw if self._dequantizer.by_columns(ref.name) else raw, start, stop)

    def _floats(self, ref: TensorRef, raw: NDArray[np.uint8], start: int, stop: int) -> NDArray[np.float32]:
        values = self._dequantizer.floats(ref, raw, start, stop)
        check_finite(values, ref.name)
        return values.reshape((stop - start, *ref.shape[1:]))

    def by_columns(self, name: str) -> bool:
        """Whether rows of a tensor come from the whole of its codes alone."""
        return self._dequantizer.by_columns(name)

    def check_scales(self) -> None:
        """Raises NonFiniteError for a scale of codes that is NaN or infinite, as far as they are few."""
        self._dequantizer.check_scales()

    def identity(self) -> tuple[Origin, ...]:
        """Name, size and time of change of each file."""
        stats = [(path.name, path.stat()) for path in self.files()]
        return tuple(Origin(name, stat.st_size, mtime_ns=stat.st_mtime_ns) for name, stat in stats)

    def digests(self) -> tuple[Origin, ...]:
        """Name, size and SHA-256 of each file; one that no `scan` went through is read for it."""
        for path in self.files():
            if path.name not in self._digests:
                self._digests[path.name] = file_sha256(path)
                self._read.add(path.stat().st_size)
        return tuple(Origin(path.name, path.stat().st_size, self._digests[path.name]) for path in self.files())

    def bytes_read(self) -> int:
        """How many bytes of the files were read so far, headers not counted."""
        return self._read.total

    def dtype(self, name: str) -> str:
        """The stored dtype of a tensor: BF16, F16, F32 or F64, F8_E4M3 of codes, or a type of GGUF such as Q4_K."""
        return self._refs[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape that a tensor is stored in."""
        return self._refs[name].shape

    def read(self, name: str) -> NDArray[np.float32]:
        """A whole tensor as float32; raises NonFiniteError if it holds NaN or infinity."""
        shape = self._refs[name].shape
        return self.read_rows(name, 0, shape[0] if shape else 1).reshape(shape)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows as float32, exact for every stored dtype but F64; raises NonFiniteError on NaN or infinity in them."""
        ref = self._refs[name]
        rows = ref.shape[0] if ref.shape else 1
        if not 0 <= start <= stop <= rows:
            raise CheckpointError(f"{name} has {rows} rows, and rows {start} to {stop} were asked for")
        if self._dequantizer.by_columns(name):
            return self._floats(ref, self._dequantizer.whole(name), start, stop)
        row_bytes = ref.nbytes // max(rows, 1)
        raw = read_exactly(ref.path, ref.offset + start * row_bytes, (stop - start) * row_bytes, self._read)
        return self._floats(ref, raw, start, stop)


def expected_tensors(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this config must hold, with its shape."""
    return decoder_of(config).tensors


def parameter_count(config: ModelConfig) -> int:
    """How many numbers a checkpoint of this config holds."""
    return sum(math.prod(shape) for shape in expected_tensors(config).values())


def open_weights(folder: Path, config: ModelConfig) -> FileWeights:
    """Opens the checkpoint's tensors, every header read and checked; raises CheckpointError naming what is wrong."""
    return weights_of(find_tensors(folder, config, read_header), folder)


def weights_of(found: FoundTensors, folder: Path) -> FileWeights:
    """The tensors of a folder as a source; raises CheckpointError for a head that is not what it is tied to."""
    source = FileWeights(found.refs, list(weight_files(folder)), found.notes, found.coded)
    source.check_scales()
    if found.other_head is not None:
        _check_tied(source, found.other_head, folder)
    return source


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files of weights that a checkpoint's folder must have, by its index, whether or not they are there."""
    return choose_files(folder).files


@dataclass(frozen=True)
class FoundTensors:
    """Each tensor that a config calls for, and a line for each choice that was made.

    `other_head` is a head that a config with tied embeddings does not call for; `coded` has those of the tensors that
    are codes with scales, and `stored_as` what they are all together, None where none is.
    """

    refs: dict[str, TensorRef]
    notes: tuple[str, ...] = ()
    other_head: TensorRef | None = None
    coded: Mapping[str, Coded] = field(default_factory=dict)
    stored_as: StoredAs | None = None


def find_tensors(folder: Path, config: ModelConfig, read: Callable[[Path], dict[str, TensorRef]]) -> FoundTensors:
    """Finds each tensor the config calls for; `read` gives the tensors of a file.

    Raises CheckpointError for what is missing, stands twice, is not called for, or has another shape, UnsupportedError
    for a checkpoint quantized in a way that is not read.
    """
    by = read_quantization(folder)
    chosen = choose_files(folder)
    stored, placed = all_tensors(chosen, read)
    found, renamed = module_tensors(of_the_decoder(stored, FAMILIES[config.model_type].text_model), folder)
    whole, found = found, tensors_meant(found, config, folder)
    further = [_of_further_tokens(config)] if config.structure.mtp_layer is None and len(found) < len(whole) else []
    found, coded = coded_tensors(found, by, stored_tensors(decoder_of(config)))
    meant = {name: ref for name, ref in found.items() if name.startswith(_DECODERS) and not is_beyond(name, config)}
    refuse_quantized(meant, folder)
    found, tied = _with_tied_table(found, config)
    _check_complete(found, stored_tensors(decoder_of(config)), folder)
    decoder = {name: ref for name, ref in found.items() if name.startswith(_DECODERS) and not _is_cache_scale(name)}
    beside = sorted(found.keys() - decoder.keys())
    left = [f"not read: {len(beside)} tensors beside the decoder, such as {beside[0][-80:]}"] if beside else []
    head = names.weight(names.LM_HEAD)
    ignorable = {head} if config.tie_word_embeddings else set()
    refs = expected_refs(decoder, config, folder, {*ITEM_BYTES, *CODES}, ignorable)
    other = found.get(head) if config.tie_word_embeddings else None
    floats = [f"{names.CONFIG_FILE} says {by.words}, and all weights are plain floats"] if by and not coded else []
    notes = (*chosen.notes, *placed, *renamed, *further, *tied, *left, *floats)
    return FoundTensors(refs, notes, other, coded, stored_as(refs, coded, by))


def _of_further_tokens(config: ModelConfig) -> str:
    """A line that says what is not read of a checkpoint with an MTP head, and what for."""
    return f"layer {config.num_hidden_layers} predicts one token more (MTP): --set speculation=mtp has it guess for cpu"


def all_tensors(
    chosen: ChosenFiles, read: Callable[[Path], dict[str, TensorRef]]
) -> tuple[dict[str, TensorRef], list[str]]:
    """The tensors of all files. One that stands in several is that of the file which the index names, with a line that
    says so; raises CheckpointError if it names neither."""
    stored: dict[str, TensorRef] = {}
    twice: list[str] = []
    for file in chosen.files:
        refs = read(file)
        for name in refs.keys() & stored.keys():
            named, earlier = chosen.named.get(name), stored[name].path.name
            if named not in (earlier, file.name):
                raise CheckpointError(f"{name} stands in {earlier} and in {file.name}: expected one of them")
            if named == earlier:
                del refs[name]
            twice.append(name)
        stored |= refs
    said = f"{len(twice)} tensors stand in several files, such as {min(twice)}: read from" if twice else ""
    return stored, [f"{said} the one that the index names"] if twice else []


def _with_tied_table(found: dict[str, TensorRef], config: ModelConfig) -> tuple[dict[str, TensorRef], list[str]]:
    """The tensors with a tied embedding that was saved under its head's name alone, and a line that says so."""
    table, head = names.weight(names.EMBED_TOKENS), names.weight(names.LM_HEAD)
    if not config.tie_word_embeddings or table in found or head not in found:
        return found, []
    others = {name: ref for name, ref in found.items() if name != head}
    return {**others, table: replace(found[head], name=table)}, [
        f"{head} is read as the embedding, which it is tied to"
    ]


def _is_cache_scale(name: str) -> bool:
    return name.endswith(_CACHE_SCALES)


def expected_refs(
    found: Mapping[str, TensorRef],
    config: ModelConfig,
    place: Path,
    dtypes: Collection[str],
    ignorable: Collection[str] = (),
) -> dict[str, TensorRef]:
    """Those of the tensors that the config calls for, by name; the `ignorable` may be there too.

    Raises CheckpointError for what is missing, is not called for, or has another shape or none of the dtypes.
    """
    expected = stored_tensors(decoder_of(config))
    _check_complete(found, expected, place)
    extra = [n for n in found.keys() - expected.keys() - set(ignorable) if not n.endswith(_COMPUTED_SUFFIXES)]
    if extra:
        raise CheckpointError(f"{place} holds {not_called_for(sorted(extra), config)}")
    refuse_integers((found[name] for name in expected), dtypes, place)
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise CheckpointError(other_shape(found[name], shape))
    return {name: found[name] for name in expected}


def _check_complete(found: Mapping[str, TensorRef], expected: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raises CheckpointError for tensors that are missing, a head alone with what that may mean."""
    missing = sorted(expected.keys() - found.keys())
    if missing == [names.weight(names.LM_HEAD)]:
        raise CheckpointError(
            f"{folder} has no {missing[0]}, and its config.json does not tie it to the embedding: if it was saved "
            "without its head, name the original; if the embedding is the head, set tie_word_embeddings to true"
        )
    others = sorted(found.keys() - expected.keys())
    if missing and len(others) >= len(missing):
        raise CheckpointError(
            f"{folder} names its tensors otherwise than its config.json calls for, {others[0][:80]} instead of "
            f"{missing[0]} for instance: its config.json is another model's, or it was saved by another program"
        )
    if missing and all(name.endswith(".bias") for name in missing):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} biases, the first is {missing[0]}: its config.json is another model's, or "
            "says attention_bias or mlp_bias of a model that has none"
        )
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors, the first is {missing[0]}: it was saved in part, or its "
            "config.json is another model's; if files are missing, download it again"
        )


def _check_tied(source: FileWeights, head: TensorRef, folder: Path) -> None:
    """Raises CheckpointError for a head that is not the embedding it is said to be tied to."""
    name = names.weight(names.EMBED_TOKENS)
    own = FileWeights({head.name: head}, [head.path])
    shape = source.shape(name)
    same, step = head.shape == shape, max(1, _COMPARED_AT_ONCE // max(shape[-1], 1))
    refuse_integers([head], ITEM_BYTES, folder)
    for row in range(0, shape[0], step) if same else ():
        stop = min(row + step, shape[0])
        same = np.array_equal(source.read_rows(name, row, stop), own.read_rows(head.name, row, stop))
        if not same:
            break
    if not same:
        raise CheckpointError(
            f"{folder} holds {head.name} with other weights than the embedding, and its config.json says they are "
            "tied: set tie_word_embeddings to false to use it, or remove it from the file"
        )
