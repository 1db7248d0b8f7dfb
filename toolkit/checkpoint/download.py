"""A checkpoint by folder, by the name of an embedded model, or by hub id; with `remote`, the only code that uses the
network."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

from toolkit.checkpoint.weights import weight_files
from toolkit.errors import CheckpointError, MachineError
from toolkit.recipe import data_folder

_SIDE_PATTERNS: Final = ("*.json", "*.jinja")
_HUB_ID: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\n")


def is_hub_id(place: str) -> bool:
    """Whether `place` is of the form owner/name, and no folder."""
    return bool(_HUB_ID.fullmatch(place)) and not Path(place).is_dir()


def resolve_checkpoint(place: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Returns a local folder for `place`. A hub id is downloaded (resumed, with progress) into huggingface_hub's cache,
    at a branch, tag or commit if `revision` names one; without `weights` its JSON files and chat templates alone.

    `HF_HUB_OFFLINE=1` is honoured: then only the cache is looked at. Raises CheckpointError with what to do.
    """
    embedded = data_folder("models") / place
    local = Path(place) if Path(place).is_dir() else embedded if "/" not in place and embedded.is_dir() else None
    if local and revision:
        raise CheckpointError(f"{place} is a folder on this machine: a revision is for hub ids, leave --revision out")
    if local:
        return local
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
        folder = Path(snapshot_download(place, revision=revision, allow_patterns=list(_SIDE_PATTERNS)))
        if not weights:
            return folder
        # Repositories hold other formats beside the files that are meant.
        wanted = [path.name for path in weight_files(folder)]
        return Path(snapshot_download(place, revision=folder.name, allow_patterns=[*_SIDE_PATTERNS, *wanted]))
    except CheckpointError:
        raise
    except Exception as problem:  # the client's errors have no common root short of Exception
        raise hub_error(place, revision, problem) from None


def hub_error(place: str, revision: str | None, problem: BaseException) -> CheckpointError:
    """Returns the error, of one line, for what huggingface_hub raised: what was asked for, why not, what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(problem, GatedRepoError):
        return CheckpointError(f"{place} asks for an agreement first: accept it on the hub, then `hf auth login`")
    if isinstance(problem, RepositoryNotFoundError):
        return CheckpointError(
            f"{place} is no folder, and not on the hub or private: check the name, or `hf auth login`"
        )
    if isinstance(problem, RevisionNotFoundError):
        return CheckpointError(f"{place} has no revision {revision!r}: name a branch, a tag or a commit of it")
    return CheckpointError(
        f"{place} could not be downloaded: {_reason(problem)}; run again to resume, or pass --checkpoint FOLDER"
    )


def _reason(problem: BaseException) -> str:
    """The first sentence of what went wrong, and of what caused it, whole and in one line."""
    root = problem
    while root.__cause__ is not None:
        root = root.__cause__
    said = [_first_sentence(one) for one in ((problem,) if root is problem else (problem, root))]
    return ": ".join(dict.fromkeys(said))


def _first_sentence(problem: BaseException) -> str:
    text = str(problem).strip() or type(problem).__name__
    return " ".join(_SENTENCE_END.split(text)[0].split()).rstrip(".")
