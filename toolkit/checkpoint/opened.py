"""A checkpoint, opened: its config, its tensors, and the folder its tokenizer lies in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from toolkit.checkpoint.config import ModelConfig, read_config
from toolkit.checkpoint.gains import with_gains
from toolkit.checkpoint.gated_queries import with_gates_apart
from toolkit.checkpoint.gguf import GgufModel, is_gguf, open_gguf
from toolkit.checkpoint.merged_rows import unmerged
from toolkit.checkpoint.mtp import mtp_config
from toolkit.checkpoint.partial_rotary import in_halves
from toolkit.checkpoint.safetensors import read_header
from toolkit.checkpoint.side_files import SideFiles, read_side_files
from toolkit.checkpoint.stacked_experts import unstacked
from toolkit.checkpoint.stored_as import StoredAs
from toolkit.checkpoint.synthetic import SyntheticWeights
from toolkit.checkpoint.weights import FileWeights, FoundTensors, WeightSource, find_tensors, weights_of
from toolkit.checkpoint.which_tensors import refuse_adapter


@dataclass(frozen=True)
class Checkpoint:
    """`synthetic` ones have random weights of the shapes that `folder`'s config names, and no tokenizer. One whose
    weights are not here, `download_bytes` of them, can be planned with and not read. `notes` are lines that a user
    should read: which of several files was meant, which ids have no weights. `stored_as` says how the weights were
    stored where they are no plain floats; of a GGUF file `folder` has what was rebuilt from its metadata."""

    folder: Path
    config: ModelConfig
    source: WeightSource
    synthetic: bool
    side: SideFiles = field(default_factory=SideFiles)
    notes: tuple[str, ...] = ()
    download_bytes: int = 0
    stored_as: StoredAs | None = None


def open_checkpoint(place: Path) -> Checkpoint:
    """A folder in Hugging Face layout or a GGUF file, every header checked against its config.

    Raises CheckpointError for what is incomplete, damaged or no checkpoint.
    """
    return _opened_gguf(place) if is_gguf(place) else _opened_folder(place)


def _opened_gguf(path: Path) -> Checkpoint:
    return gguf_checkpoint(open_gguf(path))


def gguf_checkpoint(model: GgufModel, download_bytes: int = 0) -> Checkpoint:
    """The checkpoint that a GGUF file is, with a line that says what its weights are; `download_bytes` are not here."""
    folder, stored = model.side_folder(model.source), model.stored_as
    side = read_side_files(folder, model.config.vocab_size)
    notes = (*_dequantized(stored), *side_notes(side, model.config.vocab_size))
    return Checkpoint(folder, model.config, model.source, False, side, notes, download_bytes, stored)


def _opened_folder(folder: Path) -> Checkpoint:
    refuse_adapter(folder)
    config = read_config(folder)
    found = find_tensors(folder, config, read_header)
    return found_checkpoint(folder, config, found, weights_of(found, folder))


def found_checkpoint(
    folder: Path, config: ModelConfig, found: FoundTensors, source: FileWeights, download_bytes: int = 0
) -> Checkpoint:
    """The checkpoint that a folder and its tensors are, `download_bytes` of which are not here."""
    side = read_side_files(folder, config.vocab_size)
    notes = (*found.notes, *_dequantized(found.stored_as), *side_notes(side, config.vocab_size))
    weights = unmerged(unstacked(source, config), config, source.by_columns)
    weights = in_halves(with_gates_apart(weights, config), config)
    weights = with_gains(weights, config)
    return Checkpoint(folder, config, weights, False, side, notes, download_bytes, found.stored_as)


def _dequantized(stored: StoredAs | None) -> Iterator[str]:
    """A line that says what the weights are where they are no plain floats."""
    if stored:
        yield f"the weights are those of {stored.words}, dequantized"


def side_notes(side: SideFiles, rows: int) -> Iterator[str]:
    """A line for each thing that the files beside the weights say and a bundle cannot do: ids without rows in the
    embedding, an end of text that is no token, ways to sample."""
    yield from _ids_beyond(side, rows)
    for file, text in side.eos_token.items():
        if side.vocabulary and side.vocabulary.id_of(text) is None:
            yield f"{file} names {text[:40]!r} as eos_token, which the vocabulary does not have: it ends no answer"
    if side.not_carried:
        yield (
            f"generation_config.json sets {', '.join(side.not_carried)}, for which onnxruntime-genai has no setting: "
            "left out"
        )


def _ids_beyond(side: SideFiles, rows: int) -> Iterator[str]:
    """A line if the tokenizer makes ids that the embedding has no rows for: text with them cannot be run."""
    beyond = sorted(i for i in (side.vocabulary.ids if side.vocabulary else ()) if i >= rows)
    if beyond:
        texts = {token_id: text for text, token_id in side.vocabulary.added.items()} if side.vocabulary else {}
        first = f"{beyond[0]} ({texts[beyond[0]][:40]!r})" if beyond[0] in texts else str(beyond[0])
        yield (
            f"the tokenizer has {len(beyond)} ids beyond the embedding's {rows} rows, the first is {first}: text with "
            "them cannot be run"
        )


def mtp_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The head of a checkpoint that predicts one token more, as a checkpoint of one layer, from the files that have its
    tensors; with random weights where the checkpoint's own are random or not here.

    Raises UnsupportedError where the config says that there is none, CheckpointError where the tensors are missing.
    """
    config = mtp_config(checkpoint.config)
    if checkpoint.synthetic or checkpoint.download_bytes:
        return replace(checkpoint, config=config, source=SyntheticWeights(config), notes=())
    found = find_tensors(checkpoint.folder, config, read_header)
    files = {ref.path for ref in found.refs.values()}
    source = FileWeights(found.refs, list(files), found.notes, found.coded)
    source.check_scales()
    return replace(checkpoint, config=config, source=source, notes=(), stored_as=found.stored_as)


def synthetic_checkpoint(place: Path) -> Checkpoint:
    """Random weights of the shapes in a folder's config, of which nothing else is needed, or of a GGUF file's."""
    if is_gguf(place):
        model = open_gguf(place)
        source = SyntheticWeights(model.config)
        return Checkpoint(model.side_folder(source), model.config, source, True)
    config = read_config(place)
    return Checkpoint(place, config, SyntheticWeights(config), True, read_side_files(place, config.vocab_size))
