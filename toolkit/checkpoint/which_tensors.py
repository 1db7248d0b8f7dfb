"""Which of a folder's files hold the weights that are meant, and which tensors they are by the names of their modules.

A folder may hold a stale index beside a new file, another format beside the shards, an adapter beside its base, or
names with the prefix of a wrapper. transformers resolves some of these in silence; here each is resolved as it does and
said, or refused with what to do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Final

from toolkit import names
from toolkit.checkpoint.other_formats import refuse_other_formats
from toolkit.checkpoint.safetensors import TensorRef
from toolkit.errors import CheckpointError
from toolkit.files import is_there, read_json

_MAX_INDEX_BYTES: Final = 64 << 20
ADAPTER_CONFIG_FILE: Final = "adapter_config.json"
# The table's name where a model was saved from inside its head's wrapper.
_EMBEDDING: Final = names.weight(names.EMBED_TOKENS).removeprefix("model.")
# What wrappers put before every name: torch.compile, DataParallel, PEFT.
_WRAPPERS: Final = ("_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module.")
# What they put between modules.
_BETWEEN: Final = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.")
# Of a model that is a part of another: Lightning's, and those of pictures and text.
_PART_OF: Final = ("model.model.", "language_model.model.", "model.language_model.")
# A shard's place among the others, as every program that writes shards names them.
_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


@dataclass(frozen=True)
class ChosenFiles:
    """The files that hold the weights, in order, and a line for each choice that has to be said. `named` has the file
    of each tensor by the index, if there is one."""

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict)


def choose_files(folder: Path) -> ChosenFiles:
    """Decides by what lies in a folder which files hold its weights; without any it is the one file there should be.

    Raises CheckpointError for an index that cannot be read, and for a folder whose weights are of another format.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: name a checkpoint in Hugging Face layout")
    whole, index = folder / names.SAFETENSORS_FILE, folder / names.SAFETENSORS_INDEX_FILE
    named = _weight_map(index) if is_there(index, CheckpointError) else {}
    shards = sorted(set(named.values())) or [whole.name]
    notes = []
    if is_there(whole, CheckpointError) and whole.name not in shards:
        shards, named = [whole.name], {}
        notes = [f"{index.name} is not read: {whole.name} stands beside it, and is what transformers reads"]
    elif not named and not whole.exists():
        if not (shards := _shards_without_index(folder)):
            refuse_other_formats(folder)
            shards = [whole.name]
        else:
            notes = [f"there is no {index.name}: shards are read as their names say, {len(shards)} of them"]
    files = tuple(folder / shard for shard in shards)
    unread = sorted(path.name for path in folder.glob("*.safetensors") if path not in files)
    if unread:
        notes.append(f"not read: {', '.join(unread)[:200]}")
    return ChosenFiles(files, tuple(notes), named)


def module_tensors(refs: Mapping[str, TensorRef], folder: Path) -> tuple[dict[str, TensorRef], list[str]]:
    """The tensors of all files by their modules' names, and a line for each way in which those were spelled otherwise.

    Raises CheckpointError for an adapter that is not merged.
    """
    return _unwrapped(refs, folder)


def refuse_adapter(folder: Path) -> None:
    """Raises CheckpointError for a folder with a LoRA adapter in it: which weights are meant is for the user to say."""
    path = folder / ADAPTER_CONFIG_FILE
    if not path.exists():
        return
    base = read_json(path, 1 << 20, CheckpointError, "").get("base_model_name_or_path")
    if (folder / names.CONFIG_FILE).exists():
        raise CheckpointError(
            f"{folder} holds a LoRA adapter beside its base model: move {path.name} and its weights to a folder of "
            "their own, and name that with --adapter to merge them, or leave them out"
        )
    raise CheckpointError(
        f"{folder} is a LoRA adapter for {str(base)[:80]}, no model: convert that with --checkpoint BASE "
        f"--adapter {folder}"
    )


def _shards_without_index(folder: Path) -> list[str]:
    """Every shard of the one set that the names of a folder's files tell of, the missing ones too; none where they tell
    of none, or of several."""
    found = [match for path in folder.glob("*.safetensors") if (match := _SHARD.fullmatch(path.name))]
    sets = {(match["stem"], int(match["count"])) for match in found}
    if len(sets) != 1:
        return []
    ((stem, count),) = sets
    return [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index names it; names may not leave the folder."""
    weight_map = read_json(index, _MAX_INDEX_BYTES, CheckpointError, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or PurePosixPath(file).parts != (_plain(file),) or "\\" in file or ":" in file:
            raise CheckpointError(f"{index} names {str(file)[:80]!r}: a shard must be a plain file name there")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {file[:80]!r}: only safetensors are loaded")
    return {name: _plain(file) for name, file in weight_map.items()}


def _plain(file: str) -> str:
    """A shard's name without the `./` that may stand before it."""
    return PurePosixPath(file).name


def without_wrappers(name: str) -> tuple[str, list[str]]:
    """A tensor's name without what wrappers of training put before and between its modules, and what those were."""
    removed = []
    while wrapper := next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), ""):
        name = name.removeprefix(wrapper)
        removed.append(wrapper)
    for wrapper in _BETWEEN:
        if f".{wrapper}" in name:
            name = name.replace(f".{wrapper}", ".")
            removed.append(wrapper)
    return name, removed


def of_the_decoder(stored: Mapping[str, TensorRef], prefixes: Sequence[str]) -> dict[str, TensorRef]:
    """The tensors, those of a decoder inside a model of several kinds of input, under one of the `prefixes` there, by a
    decoder's own names."""
    found, has_decoder = {}, any(name.startswith(tuple(prefixes)) for name in stored)
    for name, ref in stored.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        bare = f"model.{name.removeprefix(prefix)}" if prefix else name
        if prefixes:
            bare = bare.removeprefix("language_model.")
        if not prefix and name.startswith("model.") and has_decoder:
            # What else such a model has, as Qwen3.5's `model.visual`: not the decoder's, whose names begin so here.
            bare = name.removeprefix("model.")
        found[bare] = replace(ref, name=bare)
    return found


def _unwrapped(refs: Mapping[str, TensorRef], folder: Path) -> tuple[dict[str, TensorRef], list[str]]:
    """The tensors without the prefixes of wrappers, and with `model.` where a base model was saved without its head."""
    if unmerged := next((name for name in refs if ".lora_A." in name or ".base_layer." in name), ""):
        raise CheckpointError(f"{folder} holds a LoRA that is not merged ({unmerged[-100:]}): merge it with PEFT first")
    found: dict[str, TensorRef] = {}
    removed: list[str] = []
    for name, ref in refs.items():
        bare, wrappers = without_wrappers(name)
        removed += [wrapper for wrapper in wrappers if wrapper not in removed]
        if bare in found:
            raise CheckpointError(f"{folder} holds {bare} twice, once with a wrapper's prefix: expected one of them")
        found[bare] = replace(ref, name=bare)
    if part := next((prefix for prefix in _PART_OF if f"{prefix}{_EMBEDDING}" in found), ""):
        raise CheckpointError(
            f"{folder} names its tensors {part}…, as a part of another model: save that part alone, so that its table "
            f"is called {names.weight(names.EMBED_TOKENS)}"
        )
    notes = [f"names are read without {' and '.join(removed)}, which a wrapper put before them"] if removed else []
    if _EMBEDDING in found:
        found = {
            full: replace(ref, name=full)
            for name, ref in found.items()
            for full in [name if name.startswith("lm_head.") else f"model.{name}"]
        }
        notes.append("names are read with `model.` before them: the model was saved without its head's wrapper")
    return found, notes
