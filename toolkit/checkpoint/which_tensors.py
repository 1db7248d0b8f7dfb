"""Which of a folder's files hold the weights that are meant, and which tensors they are by the names of their modules.

A folder may hold a stale index beside a new file, another format beside the shards, an adapter beside its base, or
names with the prefix of a wrapper. transformers resolves some of these in silence; here each is resolved as it does and
said, or refused with what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final

from toolkit import names
from toolkit.checkpoint.safetensors import TensorRef
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.files import read_json

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
# What the names of quantized tensors end in, and whose they are.
_QUANTIZED: Final = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8 with block scales",
    ".weight_scale": "FP8 or compressed-tensors",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
    ".SCB": "bitsandbytes",
    "_blocks": "MXFP4",
}


@dataclass(frozen=True)
class ChosenFiles:
    """The files that hold the weights, in order, and a line for each choice that has to be said."""

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def choose_files(folder: Path) -> ChosenFiles:
    """Decides by what lies in a folder which files hold its weights; without any it is the one file there should be.

    Raises CheckpointError for an index that cannot be read, and for a folder whose weights are of another format.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: name a checkpoint in Hugging Face layout")
    whole, index = folder / names.SAFETENSORS_FILE, folder / names.SAFETENSORS_INDEX_FILE
    shards = _shards(index) if index.exists() else [whole.name]
    notes = []
    if whole.exists() and whole.name not in shards:
        shards = [whole.name]
        notes = [f"{index.name} is not read: {whole.name} stands beside it, and is what transformers reads"]
    files = tuple(folder / shard for shard in shards)
    if not index.exists() and not whole.exists():
        _refuse_other_formats(folder)
    unread = sorted(path.name for path in folder.glob("*.safetensors") if path not in files)
    if unread:
        notes.append(f"not read: {', '.join(unread)[:200]}")
    return ChosenFiles(files, tuple(notes))


def module_tensors(refs: Mapping[str, TensorRef], folder: Path) -> tuple[dict[str, TensorRef], list[str]]:
    """The tensors of all files by their modules' names, and a line for each way in which those were spelled otherwise.

    Raises UnsupportedError for quantized ones, CheckpointError for an adapter that is not merged.
    """
    _refuse_quantized(refs, folder)
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


def _refuse_other_formats(folder: Path) -> None:
    """Raises CheckpointError for a folder whose weights are no safetensors in Hugging Face's layout."""
    kinds = {path.suffix for path in folder.iterdir()}
    if any(folder.glob("consolidated*.safetensors")):
        raise CheckpointError(
            f"{folder} holds consolidated.safetensors alone, Mistral's own format: download the files in Hugging Face "
            f"layout, {names.SAFETENSORS_FILE} or shards with an index"
        )
    if ".gguf" in kinds:
        raise CheckpointError(f"{folder} holds a GGUF file and no safetensors: name the file itself to convert it")
    if kinds & {".bin", ".pt", ".pth"}:
        raise CheckpointError(f"{folder} holds .bin pickles, which are never loaded: convert to safetensors first")


def _shards(index: Path) -> list[str]:
    """The files that an index names, each once; names may not leave the folder."""
    weight_map = read_json(index, _MAX_INDEX_BYTES, CheckpointError, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or PurePosixPath(file).parts != (_plain(file),) or "\\" in file or ":" in file:
            raise CheckpointError(f"{index} names {str(file)[:80]!r}: a shard must be a plain file name there")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {file[:80]!r}: only safetensors are loaded")
    return sorted({_plain(file) for file in weight_map.values()})


def _plain(file: str) -> str:
    """A shard's name without the `./` that may stand before it."""
    return PurePosixPath(file).name


def _refuse_quantized(refs: Mapping[str, TensorRef], folder: Path) -> None:
    """Raises UnsupportedError for tensors that only a quantizer writes."""
    for name in refs:
        for suffix, whose in _QUANTIZED.items():
            if name.endswith(suffix):
                raise UnsupportedError(
                    f"{folder} is quantized already ({whose}: it holds {name[-100:]}): name the original checkpoint in "
                    "bf16, fp16 or fp32"
                )
    if any(name.removesuffix(".scales") + ".biases" in refs for name in refs if name.endswith(".scales")):
        raise UnsupportedError(f"{folder} is quantized already, by MLX: name the original checkpoint in bf16 or fp16")


def _unwrapped(refs: Mapping[str, TensorRef], folder: Path) -> tuple[dict[str, TensorRef], list[str]]:
    """The tensors without the prefixes of wrappers, and with `model.` where a base model was saved without its head."""
    if unmerged := next((name for name in refs if ".lora_A." in name or ".base_layer." in name), ""):
        raise CheckpointError(f"{folder} holds a LoRA that is not merged ({unmerged[-100:]}): merge it with PEFT first")
    found: dict[str, TensorRef] = {}
    removed: list[str] = []
    for name, ref in refs.items():
        bare = name
        while wrapper := next((prefix for prefix in _WRAPPERS if bare.startswith(prefix)), ""):
            bare = bare.removeprefix(wrapper)
            removed += [wrapper] if wrapper not in removed else []
        for wrapper in _BETWEEN:
            if f".{wrapper}" in bare:
                bare = bare.replace(f".{wrapper}", ".")
                removed += [wrapper] if wrapper not in removed else []
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
