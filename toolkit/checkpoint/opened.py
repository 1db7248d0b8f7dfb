"""A checkpoint, opened: its config, its tensors, and the folder its tokenizer lies in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from toolkit.checkpoint.config import ModelConfig, read_config
from toolkit.checkpoint.side_files import SideFiles, read_side_files
from toolkit.checkpoint.synthetic import SyntheticWeights
from toolkit.checkpoint.weights import WeightSource, open_weights


@dataclass(frozen=True)
class Checkpoint:
    """`synthetic` ones have random weights of the shapes that `folder`'s config names, and no tokenizer. One whose
    weights are not here, `download_bytes` of them, can be planned with and not read."""

    folder: Path
    config: ModelConfig
    source: WeightSource
    synthetic: bool
    side: SideFiles = field(default_factory=SideFiles)
    download_bytes: int = 0


def open_checkpoint(folder: Path) -> Checkpoint:
    """A folder in Hugging Face layout, every header checked against its config. Raises CheckpointError."""
    config = read_config(folder)
    return Checkpoint(folder, config, open_weights(folder, config), False, read_side_files(folder, config.vocab_size))


def synthetic_checkpoint(folder: Path) -> Checkpoint:
    """Random weights of the shapes in `folder`'s config; nothing else of the folder is needed."""
    config = read_config(folder)
    return Checkpoint(folder, config, SyntheticWeights(config), True, read_side_files(folder, config.vocab_size))
