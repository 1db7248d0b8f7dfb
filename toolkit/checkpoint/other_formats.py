"""What lies in a folder in place of weights that can be read: other formats, unfinished downloads, quantized tensors.

Each is one line that says what was found and what to do about it; "download it again" stands where that helps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.checkpoint.safetensors import TensorRef
from toolkit.errors import CheckpointError, UnsupportedError

NAME_THE_ORIGINAL: Final = "name the original checkpoint in bf16, fp16 or fp32"
# What training leaves beside the weights.
_NO_WEIGHTS: Final = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt")
# By the end of a file's name: what it is, and what to do.
_FORMATS: Final = {
    ".gguf": "a GGUF file and no safetensors: name the file itself to convert it",
    ".bin": ".bin pickles, which are never loaded: convert to safetensors first",
    ".pt": "pickles (.pt), which are never loaded: convert to safetensors first",
    ".pth": "pickles (.pth), which are never loaded: convert to safetensors first",
    ".ckpt": "pickles (.ckpt), which are never loaded: convert to safetensors first",
    ".distcp": "shards of a training run (.distcp): gather them with the program that trained, as safetensors",
    ".msgpack": "weights for Flax alone: take the model with safetensors",
    ".h5": "weights for TensorFlow alone: take the model with safetensors",
    ".npz": "weights in an .npz archive: take the model with safetensors",
    ".onnx": "ONNX graphs and no safetensors: name the checkpoint that they were made from",
    ".incomplete": "a download that is not finished: download it again",
    ".aria2": "a download that is not finished: download it again",
    ".part": "a download that is not finished: download it again",
}
# What the names of quantized tensors end in, and whose they are.
_QUANTIZED: Final = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8 with block scales",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_2": "ModelOpt",
    ".weight_scales": "EETQ",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    ".codes": "AQLM",
    ".weight._data": "quanto",
    ".weight_qdata": "torchao",
    ".weight._qdata": "torchao",
    "_blocks": "MXFP4",
}


def refuse_other_formats(folder: Path) -> None:
    """Raises CheckpointError for a folder whose weights are no safetensors in Hugging Face's layout, under the names
    that they have there."""
    files = sorted(path.name for path in folder.iterdir() if not path.is_dir())
    if words := other_format(files):
        raise CheckpointError(f"{folder} holds {words}")
    if "zero_to_fp32.py" in files or any(folder.glob("global_step*")):
        raise CheckpointError(
            f"{folder} holds a checkpoint of DeepSpeed: `python zero_to_fp32.py . OUT --safe_serialization` there "
            "makes safetensors of it"
        )
    if inside := _folders_with(folder, "*.safetensors"):
        raise CheckpointError(f"{folder} holds no weights, but {', '.join(inside)} does: name that folder")


def other_format(files: Sequence[str]) -> str:
    """What files by these names are in place of safetensors in Hugging Face's layout, and what to do about it; nothing
    where the names do not tell."""
    if any(name.startswith("consolidated") and name.endswith(".safetensors") for name in files):
        return (
            "consolidated.safetensors alone, Mistral's own format: download the files in Hugging Face layout, "
            f"{names.SAFETENSORS_FILE} or shards with an index"
        )
    if others := [name for name in files if name.lower().endswith(".safetensors")]:
        return (
            f"{', '.join(others)[:200]} and no {names.SAFETENSORS_FILE}: if that is the whole model, rename it to "
            f"{names.SAFETENSORS_FILE}"
        )
    for ending, words in _FORMATS.items():
        if any(name.endswith(ending) and name not in _NO_WEIGHTS for name in files):
            return words
    return ""


def missing_config(folder: Path) -> CheckpointError:
    """The error for a folder without a config.json: a folder in it may be the one that was meant."""
    expected = f"{folder / names.CONFIG_FILE} is missing: a checkpoint folder in Hugging Face layout has one"
    inside = _folders_with(folder, names.CONFIG_FILE)
    return CheckpointError(f"{expected}, and {', '.join(inside)} does: name that folder" if inside else expected)


def _folders_with(folder: Path, pattern: str) -> list[str]:
    """The folders in a folder that hold a file of this name, at most three."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and any(path.glob(pattern)))[-3:]


def refuse_quantized(refs: Mapping[str, TensorRef], folder: Path) -> None:
    """Raises UnsupportedError for tensors that only a quantizer writes."""
    for name in refs:
        for suffix, whose in _QUANTIZED.items():
            if name.endswith(suffix):
                raise UnsupportedError(
                    f"{folder} is quantized already ({whose}: it holds {name[-100:]}): {NAME_THE_ORIGINAL}"
                )
    if any(name.removesuffix(".scales") + ".biases" in refs for name in refs if name.endswith(".scales")):
        raise UnsupportedError(f"{folder} is quantized already, by MLX: {NAME_THE_ORIGINAL}")


def refuse_integers(refs: Iterable[TensorRef], dtypes: Iterable[str], folder: Path) -> None:
    """Raises UnsupportedError for a matrix or vector of the decoder in integers or 8-bit floats."""
    for ref in refs:
        if ref.dtype not in dtypes:
            raise UnsupportedError(
                f"{folder} is quantized already: {ref.name[-100:]} is {ref.dtype} {list(ref.shape)}, expected "
                f"{'/'.join(dtypes)}: {NAME_THE_ORIGINAL}"
            )
