"""A checkpoint with a LoRA adapter merged in: W + B A alpha / r, as its rows are read (arXiv 2106.09685, section 4.1).

Reads what PEFT writes: adapter_config.json beside adapter_model.safetensors, whose tensors are named after the modules
they change. Nothing is written; the merged weights are a `WeightSource` like any other.
r rank, V vocab, D hidden.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.safetensors import ITEM_BYTES, TensorRef, read_header
from toolkit.checkpoint.scan import Rows
from toolkit.checkpoint.weights import FileWeights, Origin, WeightSource, expected_tensors
from toolkit.checkpoint.which_tensors import without_wrappers
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.files import file_sha256, is_there, read_json
from toolkit.names import EMBED_TOKENS, TOKENIZER_FILE, weight

Floats = NDArray[np.float32]
CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
_MAX_CONFIG_BYTES: Final = 4 << 20
# Keys of what is added in another way than W + B A alpha / r, or elsewhere.
_NOT_PLAIN: Final = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "megatron_config",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "target_parameters",
)
# Ways to begin that take something out of the base model, so that W is another than the published one.
_CHANGE_THE_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What float32 holds.
_MOST_ALPHA: Final = 1e38
_MERGE: Final = "merge it with PEFT first"
# The adapter's own name stands in names that PEFT's save_pretrained did not write.
_FACTOR: Final = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.(?!weight$)\w+)?(\.weight)?"
)
_SAVED: Final = re.compile(r"\.modules_to_save\.((?!weight$|bias$)\w+\.)?")
# A pattern of modules that is matched in no time: few repetitions, none of a group.
_PATTERN: Final = re.compile(r"(?!.*\)[*+{?])(?!(.*[*+{]){4})[\w.\\|()^$\[\]*+?{},-]+")


@dataclass(frozen=True)
class LowRank:
    """What is added to one matrix [N, K]: `scale` times `b` [N, r] by `a` [r, K]."""

    a: Floats
    b: Floats
    scale: float

    def rows(self, start: int, stop: int) -> Floats:
        """Rows [start, stop) of the sum's second part."""
        return np.asarray(np.float32(self.scale) * (self.b[start:stop] @ self.a), np.float32)


def merge_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with the adapter in `folder` merged into it.

    Raises CheckpointError for a folder without an adapter, or one for other shapes; UnsupportedError for what is no
    plain LoRA.
    """
    config = read_json(folder / CONFIG_FILE, _MAX_CONFIG_BYTES, CheckpointError, "a LoRA adapter's folder has one")
    _check_kind(config, folder)
    path = folder / WEIGHTS_FILE
    shapes = expected_tensors(checkpoint.config)
    if checkpoint.config.structure.output_gate:
        # Rows of q_proj and k_proj are handed on in another order (gated_queries.py, partial_rotary.py).
        raise UnsupportedError(
            f"{folder}: q_proj of a {checkpoint.config.model_type} has gates between its queries, which an adapter is "
            f"not cut by: {_MERGE}"
        )
    if not is_there(path, CheckpointError):
        raise _missing(folder)
    factors, whole = _sorted_out(read_header(path), shapes, path)
    _check_saved(config, whole, folder)
    reader = FileWeights({ref.name: ref for pair in factors.values() for ref in pair.values()}, [path])
    added = {name: _low_rank(name, pair, shapes, reader, config, path) for name, pair in sorted(factors.items())}
    for name, ref in whole.items():
        if ref.shape != shapes[name] or ref.dtype not in ITEM_BYTES:
            raise CheckpointError(f"{path}: {ref.name} is {ref.dtype} {list(ref.shape)}, expected {list(shapes[name])}")
    source = MergedTensors(checkpoint.source, added, FileWeights(whole, [path]) if whole else None, path)
    return replace(checkpoint, source=source, notes=(*checkpoint.notes, *_own_tokenizer(checkpoint, folder)))


def _missing(folder: Path) -> CheckpointError:
    """The error for an adapter without weights that can be read: what there is in their place."""
    if (folder / "adapter_model.bin").exists():
        return CheckpointError(
            f"{folder} holds adapter_model.bin, a pickle, which is never loaded: save the adapter as safetensors"
        )
    return CheckpointError(f"{folder / WEIGHTS_FILE} is missing: the adapter is incomplete")


def _sorted_out(
    refs: Mapping[str, TensorRef], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> tuple[dict[str, dict[str, TensorRef]], dict[str, TensorRef]]:
    """The two factors of each matrix, and the tensors that replace the checkpoint's, both by the checkpoint's names.

    Raises CheckpointError for what fits nothing, stands twice or is no float, UnsupportedError for DoRA's magnitudes.
    """
    factors: dict[str, dict[str, TensorRef]] = {}
    whole: dict[str, TensorRef] = {}
    for name, ref in refs.items():
        if "lora_magnitude_vector" in name:
            raise UnsupportedError(f"{path} holds {name[-100:]}, of DoRA, which is no plain LoRA: {_MERGE}")
        if ref.dtype not in ITEM_BYTES:
            raise CheckpointError(f"{path}: {name[-100:]} is {ref.dtype}, expected {'/'.join(ITEM_BYTES)}")
        local = _SAVED.sub(".", without_wrappers(name)[0].replace(".base_layer.", "."))
        found = _FACTOR.fullmatch(local)
        if not found and local not in shapes:
            raise CheckpointError(f"{path}: {name} fits nothing in the checkpoint: another model's adapter")
        place = factors.setdefault(weight(found["module"]), {}) if found else whole
        key = found["side"] if found else local
        if key in place:
            raise CheckpointError(f"{path} holds {place[key].name} and {name}: expected one adapter in a file")
        place[key] = ref
    if not factors and not whole:
        raise CheckpointError(f"{path} holds no tensors: it was saved before it was trained, or by another program")
    return factors, whole


def _check_saved(config: Mapping[str, Any], whole: Mapping[str, TensorRef], folder: Path) -> None:
    """Raises CheckpointError for a module that was trained as a whole and whose weights are not in the file."""
    listed = config.get("modules_to_save")
    for module in listed if isinstance(listed, list) else ():
        if not any(f".{module}." in f".{name}" for name in whole):
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: modules_to_save names {module!r:.60}, and {WEIGHTS_FILE} has no weights of "
                "it: save the adapter again with PEFT's save_pretrained"
            )


def _own_tokenizer(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """A line if the adapter comes with another tokenizer than the checkpoint has."""
    own, base = folder / TOKENIZER_FILE, checkpoint.folder / TOKENIZER_FILE
    if not own.is_file() or (base.is_file() and file_sha256(own) == file_sha256(base)):
        return []
    return [f"not read: {own}, which is another than the checkpoint's"]


def _check_kind(config: Mapping[str, Any], folder: Path) -> None:
    """Raises UnsupportedError for an adapter that is not W + B A alpha / r."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{folder / CONFIG_FILE}: peft_type is {kind!r}, expected 'LORA': {_MERGE}")
    begins = config.get("init_lora_weights")
    if isinstance(begins, str) and begins.lower().startswith(_CHANGE_THE_BASE):
        raise UnsupportedError(
            f"{folder / CONFIG_FILE}: init_lora_weights is {begins[:40]!r}, which changed the base model's own "
            f"weights: {_MERGE}"
        )
    for key in _NOT_PLAIN:
        if config.get(key):
            raise UnsupportedError(f"{folder / CONFIG_FILE}: {key} is set, which is no plain LoRA: {_MERGE}")
    if config.get("bias") not in (None, "none"):
        raise UnsupportedError(f"{folder / CONFIG_FILE}: bias is {config['bias']!r}, expected 'none': {_MERGE}")


def _low_rank(
    name: str,
    pair: Mapping[str, TensorRef],
    shapes: Mapping[str, tuple[int, ...]],
    reader: FileWeights,
    config: Mapping[str, Any],
    path: Path,
) -> LowRank:
    """The two factors of one matrix, checked against its shape. An embedding's stand the other way round."""
    if name not in shapes or len(shapes[name]) != 2 or len(pair) != 2:
        raise CheckpointError(
            f"{path}: the factors of {name} fit no matrix of the checkpoint: it is another model's adapter"
        )
    a, b = reader.read(pair["A"].name), reader.read(pair["B"].name)
    if name == weight(EMBED_TOKENS) and "embedding" in pair["A"].name:
        a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
    rows, columns = shapes[name]
    if a.ndim != 2 or b.ndim != 2 or b.shape[0] != rows or a.shape[1] != columns or a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"{path}: the factors of {name} are {list(b.shape)} and {list(a.shape)}, the matrix is [{rows}, {columns}]"
        )
    module, rank, settings = name.removesuffix(".weight"), a.shape[0], path.with_name(CONFIG_FILE)
    said = _by_pattern(config.get("rank_pattern"), module, config.get("r"), settings)
    if not rank or said not in (None, rank):
        raise CheckpointError(f"{settings}: the rank of {name} is {said!r:.40}, and its factors have {rank}")
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"), settings)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < _MOST_ALPHA:
        raise CheckpointError(f"{settings}: lora_alpha is {alpha!r:.60}, expected a number")
    return LowRank(a, b, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _by_pattern(patterns: object, module: str, default: object, settings: Path) -> object:
    """The value of the first pattern that matches the end of a module's name, as PEFT matches them; the default else.

    Raises UnsupportedError for a pattern that could take for ever.
    """
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if not _PATTERN.fullmatch(pattern[:200]):
                raise re.error("it is not one of modules' names")
            matched = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except re.error:
            raise UnsupportedError(f"{settings}: the pattern {pattern!r:.60} is not understood: {_MERGE}") from None
        if matched:
            return value
    return default


class MergedTensors:
    """A `WeightSource` over another; `added` has what is added to matrices, `whole` tensors that replace others."""

    def __init__(
        self, source: WeightSource, added: Mapping[str, LowRank], whole: FileWeights | None, path: Path
    ) -> None:
        self._source, self._added, self._whole, self._path = source, added, whole, path
        self._replaced = frozenset(whole.names()) if whole else frozenset()
        self.names, self.bytes_read = source.names, source.bytes_read

    def read(self, name: str) -> Floats:
        """Reads a whole tensor as float32, the adapter's share added."""
        if self._whole and name in self._replaced:
            values = self._whole.read(name)
            return self._merged(name, values, 0) if values.ndim == 2 else values
        values = self._source.read(name)
        return self._merged(name, values, 0) if values.ndim == 2 else values

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Reads rows [start, stop) as float32, the adapter's share added."""
        if self._whole and name in self._replaced:
            return self._merged(name, self._whole.read_rows(name, start, stop), start)
        return self._merged(name, self._source.read_rows(name, start, stop), start)

    def scan(self, chunk_bytes: int) -> Iterator[Rows]:
        """Every row once, in the order of the checkpoint's files."""
        return self._source.scan(chunk_bytes)

    def decode(self, rows: Rows, start: int, stop: int) -> Floats:
        """Some rows of a merged tensor."""
        if self._whole and rows.name in self._replaced:
            return self._merged(rows.name, self._whole.read_rows(rows.name, start, stop), start)
        return self._merged(rows.name, self._source.decode(rows, start, stop), start)

    def identity(self) -> tuple[Origin, ...]:
        """Name, size and time of change of the checkpoint's files and of the adapter's."""
        stats = [(path.name, path.stat()) for path in self._files()]
        own = (Origin(name, stat.st_size, mtime_ns=stat.st_mtime_ns) for name, stat in stats)
        return (*self._source.identity(), *own)

    def digests(self) -> tuple[Origin, ...]:
        """Name, size and SHA-256 of the checkpoint's files and of the adapter's."""
        own = (Origin(path.name, path.stat().st_size, file_sha256(path)) for path in self._files())
        return (*self._source.digests(), *own)

    def _files(self) -> tuple[Path, Path]:
        """The adapter's factors, and the settings that scale them."""
        return self._path, self._path.with_name(CONFIG_FILE)

    def _merged(self, name: str, values: Floats, start: int) -> Floats:
        if name not in self._added:
            return values
        return values + self._added[name].rows(start, start + values.shape[0])
