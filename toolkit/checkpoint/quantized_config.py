"""What a checkpoint says of how its weights were quantized: in config.json, or in ModelOpt's own file.

The tensors themselves tell most: their names, dtypes and shapes. What they leave open is read here, and a method that
is not read is refused before a header is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from toolkit import names
from toolkit.checkpoint.fields import Fields
from toolkit.checkpoint.other_formats import NAME_THE_ORIGINAL
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.files import is_there, read_json

MODELOPT_FILE: Final = "hf_quant_config.json"
_MAX_BYTES: Final = 4 << 20
_FP8: Final = ("fp8", "fbgemm_fp8")
_COMPRESSED_TENSORS: Final = ("compressed-tensors", "compressed_tensors")
_MODELOPT: Final = ("modelopt", "modelopt_fp4")
_AUTO_ROUND: Final = "auto-round"
METHODS: Final = (*_FP8, _COMPRESSED_TENSORS[0], _MODELOPT[0], "gptq", "awq", _AUTO_ROUND, "mxfp4")
# What compressed-tensors calls the ways to store that are read, and ModelOpt its algorithms.
_FORMATS: Final = (
    *("float-quantized", "naive-quantized", "int-quantized", "pack-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision", "dense"),
)
_ALGORITHMS: Final = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "MIXED_PRECISION")
# GPTQ's ways to store: the first one's zero points are less by one.
_GPTQ_LESS_ONE: Final = "gptq"
_GPTQ_FORMATS: Final = (_GPTQ_LESS_ONE, "gptq_v2")
# AutoRound's ways to store are GPTQ's and AWQ's, under names of its own (auto_round/inference/backend.py). Where none
# is written it takes the first.
_AUTO_ROUND_FORMATS: Final = {
    "auto_round:auto_gptq": _GPTQ_LESS_ONE,
    "auto_round:gptq": _GPTQ_LESS_ONE,
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}


@dataclass(frozen=True)
class QuantizedBy:
    """How weights were quantized: by which method, in its own words for a reader, the rows and columns that share a
    scale where scales stand in blocks, and the columns where they stand in groups, None for whole rows."""

    method: str
    words: str
    weight_block_size: tuple[int, int] = (128, 128)
    group_size: int | None = None
    zeros_less_one: bool = False


def read_quantization(folder: Path) -> QuantizedBy | None:
    """How a folder says that its weights were quantized; None where it says nothing.

    Raises UnsupportedError for a method that is not read, CheckpointError for a file that cannot be.
    """
    path = folder / names.CONFIG_FILE
    said = quantization_of(_read(path), path)
    path = folder / MODELOPT_FILE
    if said is not None or not is_there(path, CheckpointError):
        return said
    given = _read(path).get("quantization")
    if not isinstance(given, dict) or given.get("quant_algo") is None:
        return None
    return _modelopt(Fields(given, path, {}))


def quantization_of(raw: Mapping[str, Any], path: Path) -> QuantizedBy | None:
    """What the contents of a config.json say of it; `path` appears in messages alone. Raises as `read_quantization`."""
    if isinstance(raw.get("quantization"), dict):
        raise _not_read("MLX", path)
    given = raw.get("quantization_config") or raw.get("compression_config")
    if not given:
        return None
    if not isinstance(given, dict):
        raise UnsupportedError(
            f"{path}: the checkpoint is already quantized, and quantization_config is {str(given)[:40]!r}, expected "
            f"an object: {NAME_THE_ORIGINAL}"
        )
    read, method = Fields(given, path, {}), _method(given)
    if method in _FP8:
        return _fp8(read, method)
    if method in _COMPRESSED_TENSORS:
        return _compressed_tensors(read)
    if method in _MODELOPT:
        return _modelopt(read)
    if method in ("gptq", "awq"):
        return (_gptq if method == "gptq" else _awq)(read)
    if method in (_AUTO_ROUND, f"intel/{_AUTO_ROUND}"):
        return _auto_round(read)
    if method == "mxfp4":
        return QuantizedBy(method, method)
    raise _not_read(method, path)


def _read(path: Path) -> Mapping[str, Any]:
    return read_json(path, _MAX_BYTES, CheckpointError, "a checkpoint folder in Hugging Face layout has one")


def _method(given: Mapping[str, Any]) -> str:
    producer = given.get("producer")
    method = given.get("quant_method") or (producer.get("name") if isinstance(producer, dict) else None)
    if not method and any(key.startswith(("load_in_", "bnb_", "_load_in_")) for key in given):
        method = "bitsandbytes"
    return str(method or "")


def _not_read(method: str, path: Path) -> UnsupportedError:
    by = f" by {method[:40]}" if method else ""
    return UnsupportedError(
        f"{path}: the checkpoint is already quantized{by}, which is not read (expected {', '.join(METHODS)}): "
        f"{NAME_THE_ORIGINAL}; if its weights are that again, as after a merge, take quantization_config out of "
        "config.json"
    )


def _fp8(read: Fields, method: str) -> QuantizedBy:
    """transformers' and DeepSeek's `fp8`, Meta's `fbgemm_fp8`."""
    if read.get("fmt") not in (None, "e4m3"):
        raise UnsupportedError(f"{read.path}: fmt of quantization_config is {read.get('fmt')!r:.40}, expected 'e4m3'")
    return QuantizedBy(method, method, _block(read.get("weight_block_size"), "weight_block_size", read.path))


def _compressed_tensors(read: Fields) -> QuantizedBy:
    """vLLM's format: a way to store, and groups of modules with the settings of each."""
    way = read.get("format")
    if way not in _FORMATS:
        raise UnsupportedError(
            f"{read.path}: format of quantization_config (compressed-tensors) is {way!r:.40}, expected one of "
            f"{', '.join(_FORMATS)}: "
            f"{NAME_THE_ORIGINAL}"
        )
    sparsity = read.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise UnsupportedError(f"{read.path}: sparse weights are not read: {NAME_THE_ORIGINAL}")
    groups = read.get("config_groups")
    given = groups.values() if isinstance(groups, dict) else ()
    found = [group.get("weights") for group in given if isinstance(group, dict)]
    settings = [one for one in found if isinstance(one, dict)]
    blocks = {str(one.get("block_structure")): one.get("block_structure") for one in settings}
    blocks = {words: block for words, block in blocks.items() if block is not None}
    if len(blocks) > 1:
        raise UnsupportedError(f"{read.path}: groups of quantization_config differ in block_structure, expected one")
    block = _block(next(iter(blocks.values()), None), "block_structure", read.path)
    sizes = {size for one in settings if (size := _group_size(Fields(one, read.path, {})))}
    if len(sizes) > 1:
        raise UnsupportedError(f"{read.path}: groups of quantization_config differ in group_size, expected one")
    return QuantizedBy(_COMPRESSED_TENSORS[0], f"{_COMPRESSED_TENSORS[0]} {way}", block, next(iter(sizes), None))


def _modelopt(read: Fields) -> QuantizedBy:
    """NVIDIA's ModelOpt, whose settings name an algorithm."""
    algorithm = read.get("quant_algo")
    if algorithm not in _ALGORITHMS:
        raise UnsupportedError(
            f"{read.path}: quant_algo (modelopt) is {algorithm!r:.40}, expected one of {', '.join(_ALGORITHMS)}: "
            f"{NAME_THE_ORIGINAL}"
        )
    return QuantizedBy(_MODELOPT[0], f"{_MODELOPT[0]} {algorithm}")


def _gptq(read: Fields) -> QuantizedBy:
    """AutoGPTQ's and GPTQModel's."""
    way = read.get("checkpoint_format") or _GPTQ_LESS_ONE
    if way not in _GPTQ_FORMATS or read.get("is_marlin_format"):
        raise UnsupportedError(
            f"{read.path}: checkpoint_format of quantization_config (gptq) is {way!r:.40}, expected one of "
            f"{', '.join(_GPTQ_FORMATS)}: {NAME_THE_ORIGINAL}"
        )
    words = f"gptq {read.count('bits')} bits"
    return QuantizedBy("gptq", words, group_size=_group_size(read), zeros_less_one=way == _GPTQ_LESS_ONE)


def _awq(read: Fields) -> QuantizedBy:
    """AutoAWQ's, as its GEMM kernels read it."""
    version, bits = read.get("version") or "gemm", read.count("bits", 4)
    if str(version).lower() != "gemm" or bits != 4:
        raise UnsupportedError(
            f"{read.path}: quantization_config (awq) has {bits} bits and version {version!r:.40}, expected 4 and "
            f"'gemm': {NAME_THE_ORIGINAL}"
        )
    return QuantizedBy("awq", "awq 4 bits", group_size=_group_size(read))


def _auto_round(read: Fields) -> QuantizedBy:
    """Intel's AutoRound."""
    way = read.get("packing_format") or "auto_round:auto_gptq"
    stored = _AUTO_ROUND_FORMATS.get(way) if isinstance(way, str) else None
    if stored is None or read.get("data_type") not in (None, "int"):
        raise UnsupportedError(
            f"{read.path}: quantization_config (auto-round) has packing_format {way!r:.60} and data_type "
            f"{read.get('data_type')!r:.40}, expected one of {', '.join(_AUTO_ROUND_FORMATS)} and 'int': "
            f"{NAME_THE_ORIGINAL}"
        )
    method = "awq" if stored == "awq" else "gptq"
    words = f"{_AUTO_ROUND} ({method}) {read.count('bits')} bits"
    return QuantizedBy(method, words, group_size=_group_size(read), zeros_less_one=stored == _GPTQ_LESS_ONE)


def _group_size(read: Fields) -> int | None:
    """Columns that share a scale; None where a whole row does, which files write as -1."""
    return None if read.get("group_size") in (None, -1) else read.count("group_size")


def _block(given: object, key: str, path: Path) -> tuple[int, int]:
    """Rows and columns of a block, 128 of each where none are given. Compressed-tensors once wrote them as 128x128."""
    sides = given.split("x") if isinstance(given, str) else given
    if sides is None:
        return 128, 128
    if isinstance(sides, list) and len(sides) == 2 and all(str(side).isdecimal() for side in sides):
        rows, columns = (int(str(side)[:10]) for side in sides)
        if rows and columns:
            return rows, columns
    raise CheckpointError(f"{path}: {key} of quantization_config is {given!r:.60}, expected rows and columns")
