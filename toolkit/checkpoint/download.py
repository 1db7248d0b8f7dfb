"""A checkpoint by folder or GGUF file, by the name of an embedded model, or by its name on the hub; with `remote`, the
only code that uses the network."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from toolkit.checkpoint.fetched import fetched_folder, is_url, local_path
from toolkit.checkpoint.gguf import is_gguf, split_set
from toolkit.checkpoint.other_formats import other_format
from toolkit.checkpoint.quantized_config import MODELOPT_FILE
from toolkit.checkpoint.side_files import TEMPLATES_FOLDER, side_files_of
from toolkit.checkpoint.weights import weight_files
from toolkit.checkpoint.which_tensors import ADAPTER_CONFIG_FILE
from toolkit.errors import CheckpointError, MachineError
from toolkit.names import SAFETENSORS_INDEX_FILE
from toolkit.recipe import data_folder

# What lies beside the weights, in the repository's root: others in folders are of other formats, or of training. The
# last ones are not read, and say how a tokenizer.json can be made.
_SIDE_PATTERNS: Final = (
    *(path.name for path in side_files_of(Path())),
    f"{TEMPLATES_FOLDER}/*.jinja",
    SAFETENSORS_INDEX_FILE,
    MODELOPT_FILE,
    ADAPTER_CONFIG_FILE,
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
)
_HUB_ID: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# A GGUF file in a repository of the hub, owner/name:file; no folder in it leads upwards.
_HUB_FILE: Final = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*):(?P<file>((?!\.+/)[\w.-]+/)*[\w.-]+\.gguf)")
_LICENSE_TIMEOUT_S: Final = 5.0
_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\n")


def is_hub_id(place: str) -> bool:
    """Whether `place` is of the form owner/name, and nothing on this machine."""
    return bool(_HUB_ID.fullmatch(place)) and not Path(place).exists()


def hub_file(place: str) -> tuple[str, str] | None:
    """Repository and file of an `owner/name:file.gguf`; None for anything else."""
    found = _HUB_FILE.fullmatch(place)
    return (found["repo"], found["file"]) if found else None


def resolve_checkpoint(place: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Returns a local folder or GGUF file for `place`, at a branch, tag or commit if `revision` names one.

    A hub id, or a GGUF file on the hub with the set that it is of, is downloaded (resumed, with progress) into
    huggingface_hub's cache; without `weights` a hub id's JSON files and chat templates alone.
    `HF_HUB_OFFLINE=1` is honoured: then only the cache is looked at. A URL's files are copied once into this toolkit's
    own cache. Raises CheckpointError with what to do.
    """
    place = local_path(place)
    if is_url(place):
        if revision:
            raise CheckpointError(f"{place} is a URL: a revision is for hub ids, leave --revision out")
        return fetched_folder(place, _SIDE_PATTERNS, weight_files)
    embedded = data_folder("models") / place
    here = Path(place).is_dir() or (is_gguf(Path(place)) and Path(place).exists())
    local = Path(place) if here else embedded if "/" not in place and embedded.is_dir() else None
    if local and revision:
        raise CheckpointError(f"{place} is on this machine: a revision is for hub ids, leave --revision out")
    if local:
        return local
    if on_hub := hub_file(place):
        return _downloaded(place, revision, lambda download: _gguf_set(*on_hub, download))
    if is_gguf(Path(place)):
        raise CheckpointError(f"{place} is missing, and no file on the hub (owner/name:file.gguf)")
    if not _HUB_ID.fullmatch(place):
        raise CheckpointError(f"{place} is neither a folder, a GGUF file nor a hub id (owner/name)")
    return _downloaded(place, revision, lambda download: _repository(place, weights, download))


# Downloads what of a repository matches patterns, at a revision or the one that was asked for; returns its folder.
_Download = Callable[[str, Sequence[str], str | None], Path]


def _downloaded(place: str, revision: str | None, take: Callable[[_Download], Path]) -> Path:
    """What `take` returns, given how to download. Raises CheckpointError for whatever the hub's client raises."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise MachineError("huggingface_hub is not installed: pip install huggingface_hub") from None
    if not sys.stderr.isatty():
        disable_progress_bars()

    def download(repository: str, patterns: Sequence[str], at: str | None) -> Path:
        return Path(snapshot_download(repository, revision=at or revision, allow_patterns=list(patterns)))

    try:
        return take(download)
    except CheckpointError:
        raise
    except Exception as problem:  # the client's errors have no common root short of Exception
        raise hub_error(place, revision, problem) from None


def _repository(place: str, weights: bool, download: _Download) -> Path:
    folder = download(place, _SIDE_PATTERNS, None)
    if not weights:
        return folder
    # Repositories hold other formats beside the files that are meant.
    wanted = [path.name for path in weight_files(folder)]
    whole = download(place, [*_SIDE_PATTERNS, *wanted], folder.name)
    if not any((whole / name).is_file() for name in wanted) and (words := _in_their_place(place, folder.name)):
        raise CheckpointError(f"{place} holds {words}")
    return whole


def _in_their_place(place: str, revision: str | None) -> str:
    """What a repository of the hub holds in place of weights, and what to do about it; nothing if that is not known."""
    from huggingface_hub import list_repo_files

    with suppress(Exception):  # the client's errors have no common root short of Exception
        return other_format([name for name in list_repo_files(place, revision=revision) if "/" not in name])
    return ""


def _gguf_set(repository: str, file: str, download: _Download) -> Path:
    wanted = [path.as_posix() for path in split_set(Path(file))]
    path = download(repository, wanted, None) / file
    if not path.is_file():
        raise CheckpointError(f"{repository} has no file {file}: look up its name on the hub")
    return path


def downloaded_bytes(place: str, files: Sequence[Path]) -> int:
    """How many bytes of a hub id's files, paths in its snapshot's folder, are in huggingface_hub's cache, with what has
    arrived of those that are still being downloaded."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    repository = (hub_file(place) or (place,))[0]
    blobs = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model") / "blobs"
    return sum(_size(path) for path in (*files, *blobs.glob("*.incomplete")))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # not there yet, or no longer under that name
        return 0


def hub_license(place: str) -> str | None:
    """The licence that a hub id's page names, in the hub's words; None where it names none, or cannot be asked."""
    try:
        from huggingface_hub import HfApi

        found = HfApi().model_info(place.partition(":")[0], timeout=_LICENSE_TIMEOUT_S)
        tags = [tag.removeprefix("license:") for tag in found.tags or [] if tag.startswith("license:")]
        return tags[0] if tags else None
    except Exception:  # a licence that is not known keeps nobody from converting
        return None


def hub_error(place: str, revision: str | None, problem: BaseException) -> CheckpointError:
    """Returns the error, of one line, for what huggingface_hub raised: what was asked for, why not, what to do."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(problem, GatedRepoError):
        return CheckpointError(f"{place} asks for an agreement first: accept it on the hub, then `hf auth login`")
    if isinstance(problem, RepositoryNotFoundError):
        return CheckpointError(
            f"{place} is no folder, and not on the hub or private: check the name, or `hf auth login`"
        )
    if isinstance(problem, EntryNotFoundError) and (words := _in_their_place(place, revision)):
        return CheckpointError(f"{place} holds {words}")
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
