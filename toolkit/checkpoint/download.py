"""A checkpoint by folder, by the name of an embedded model, or by hub id; the only code that uses the network."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

from toolkit.errors import CheckpointError, MachineError
from toolkit.recipe import data_folder

_PATTERNS: Final = ("*.json", "*.safetensors", "*.jinja")
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_checkpoint(place: str) -> Path:
    """A local folder for `place`. A hub id is downloaded (resumed, with progress) into huggingface_hub's cache.

    `HF_HUB_OFFLINE=1` is honoured: then only the cache is looked at. Raises CheckpointError with what to do.
    """
    if Path(place).is_dir():
        return Path(place)
    embedded = data_folder("models") / place
    if "/" not in place and embedded.is_dir():
        return embedded
    if not _HUB_ID.fullmatch(place):
        raise CheckpointError(f"{place} is neither a folder nor a hub id (owner/name)")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise MachineError("huggingface_hub is not installed: pip install huggingface_hub") from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(snapshot_download(place, allow_patterns=list(_PATTERNS)))
    except Exception as problem:  # the client's errors have no common root short of Exception
        reason = str(problem).strip().splitlines()[0][:160]
        raise CheckpointError(
            f"{place} could not be downloaded: {reason}; run again to resume, or pass --checkpoint FOLDER"
        ) from None
