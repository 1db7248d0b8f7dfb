"""A checkpoint, opened: its config, its tensors, and the folder its tokenizer lies in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from toolkit.checkpoint.config import ModelConfig, read_config
from toolkit.checkpoint.side_files import SideFiles, read_side_files
from toolkit.checkpoint.synthetic import SyntheticWeights
from toolkit.checkpoint.weights import WeightSource, open_weights
from toolkit.checkpoint.which_tensors import refuse_adapter


@dataclass(frozen=True)
class Checkpoint:
    """`synthetic` ones have random weights of the shapes that `folder`'s config names, and no tokenizer. One whose
    weights are not here, `download_bytes` of them, can be planned with and not read. `notes` are lines that a user
    should read: which of several files was meant, which ids have no weights."""

    folder: Path
    config: ModelConfig
    source: WeightSource
    synthetic: bool
    side: SideFiles = field(default_factory=SideFiles)
    notes: tuple[str, ...] = ()
    download_bytes: int = 0


def open_checkpoint(folder: Path) -> Checkpoint:
    """A folder in Hugging Face layout, every header checked against its config. Raises CheckpointError."""
    refuse_adapter(folder)
    config = read_config(folder)
    source, side = open_weights(folder, config), read_side_files(folder, config.vocab_size)
    return Checkpoint(folder, config, source, False, side, (*source.notes, *_ids_beyond(side, config.vocab_size)))


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


def synthetic_checkpoint(folder: Path) -> Checkpoint:
    """Random weights of the shapes in `folder`'s config; nothing else of the folder is needed."""
    config = read_config(folder)
    return Checkpoint(folder, config, SyntheticWeights(config), True, read_side_files(folder, config.vocab_size))
