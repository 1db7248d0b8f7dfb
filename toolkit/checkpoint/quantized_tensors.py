"""Which of a checkpoint's tensors are codes and scales, and the weights that they make together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from toolkit.checkpoint.other_formats import NAME_THE_ORIGINAL
from toolkit.checkpoint.quantized_config import QuantizedBy
from toolkit.checkpoint.quantized_packing import (
    Coded,
    awq_codes,
    checked,
    experts_codes,
    fp4_codes,
    gptq_codes,
    packed_codes,
)
from toolkit.checkpoint.safetensors import TensorRef
from toolkit.checkpoint.stored_as import StoredAs
from toolkit.errors import CheckpointError, UnsupportedError

Parts = Mapping[str, TensorRef]
# What stands beside a module's codes: of the weight, by the two ways to name it, and what a runtime alone reads.
_SCALES: Final = ("weight_scale_inv", "weight_scale")
_WEIGHTS: Final = ("weight_packed", "weight_scale_2", "weight_global_scale", "weight_zero_point", "weight_g_idx")
_GPTQ: Final = ("qweight", "qzeros", "scales", "g_idx")
# What follows the name of experts that are one tensor.
_EXPERTS: Final = ("_blocks", "_scales")
_UNREAD: Final = (
    *("weight_shape", "input_scale", "activation_scale", "output_scale", "input_scale_ub", "input_zero_point"),
    "input_global_scale",
)
_PARTS: Final = ("weight", *_SCALES, *_WEIGHTS, *_GPTQ, *_UNREAD, "bias")
# Codes by the dtype of the tensor `weight`; U8 are pairs of FP4 where a second scale stands beside them.
_BYTES: Final = ("F8_E4M3", "I8")
_BYTE_SCALES: Final = ("F32", "BF16", "F16", "F8_E8M0")
CODES: Final = (*_BYTES, "INT2", "INT4", "INT8", "NVFP4", "MXFP4")


def coded_tensors(
    refs: Mapping[str, TensorRef], by: QuantizedBy | None, expected: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, TensorRef], dict[str, Coded]]:
    """The tensors with each wanted weight that is stored as codes in place of these and what stands beside them, and
    how it is stored, by its name.

    Raises CheckpointError for codes without their scale, or with one of another shape or dtype; UnsupportedError for
    codes that are not read.
    """
    left = dict(refs)
    coded: dict[str, Coded] = {}
    for name, shape in expected.items():
        parts = _parts(name, refs)
        found = _coded(name, shape, parts, by)
        if found is None:
            continue
        bias = parts.pop("bias", None)
        if bias is not None and bias.name not in expected:
            found = replace(found, zero_bias=bias)
            del left[bias.name]
        for part in parts.values():
            del left[part.name]
        coded[name] = found
        left[name] = replace(found.codes, name=name)
    return left, coded


def _parts(name: str, refs: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """What may belong to a weight, by what follows its module's name, or its own where experts are one tensor."""
    module, _, last = name.rpartition(".")
    ends = {part: f"{module}.{part}" for part in _PARTS} if last == "weight" else {end: name + end for end in _EXPERTS}
    return {end: refs[whole] for end, whole in ends.items() if whole in refs}


def stored_as(refs: Mapping[str, TensorRef], coded: Mapping[str, Coded], by: QuantizedBy | None) -> StoredAs | None:
    """What a checkpoint's tensors are, some of which are coded; None where none is."""
    kinds = Counter(ref.dtype for ref in refs.values())
    if not coded:
        return None
    nbytes = sum(coded[name].nbytes if name in coded else ref.nbytes for name, ref in refs.items())
    weights = sum(math.prod(ref.shape) for ref in refs.values())
    words = by.words if by else next(iter(coded.values())).codes.dtype
    return StoredAs(words, round(8 * nbytes / weights, 3), dict(kinds.most_common()))


def _coded(name: str, shape: tuple[int, ...], parts: Parts, by: QuantizedBy | None) -> Coded | None:
    """How a weight of this shape is stored, by the tensors of its module; None where it is floats, or not there."""
    if len(shape) == 3:
        return experts_codes(name, shape, parts) if _EXPERTS[0] in parts else None
    return _matrix(name, (shape[0], shape[1]), parts, by) if len(shape) == 2 else None


def _matrix(name: str, shape: tuple[int, int], parts: Parts, by: QuantizedBy | None) -> Coded | None:
    weight, packed = parts.get("weight"), parts.get("weight_packed")
    if weight is not None:
        if weight.dtype in _BYTES:
            return _byte_codes(weight, parts, by)
        return fp4_codes(name, shape, weight, parts) if weight.dtype == "U8" and "weight_scale_2" in parts else None
    if packed is not None:
        return fp4_codes(name, shape, packed, parts) if packed.dtype == "U8" else packed_codes(name, shape, parts, by)
    if "qweight" not in parts:
        return None
    if by is None or by.method not in ("gptq", "awq"):
        raise UnsupportedError(
            f"{parts['qweight'].name[-100:]} is quantized by GPTQ or AWQ, and config.json does not say by which: "
            f"download its quantization_config, or {NAME_THE_ORIGINAL}"
        )
    return (gptq_codes if by.method == "gptq" else awq_codes)(name, shape, parts, by)


def _byte_codes(codes: TensorRef, parts: Parts, by: QuantizedBy | None) -> Coded:
    """Codes of a byte each, in the weight's own shape."""
    scale = next((parts[part] for part in _SCALES if part in parts), None)
    if scale is None:
        expected = " or ".join(f"{codes.name}{part.removeprefix('weight')}" for part in _SCALES)
        raise CheckpointError(
            f"{codes.name[-100:]} is {codes.dtype} {list(codes.shape)} and quantized, and its scale is missing, "
            f"expected {expected[-220:]}: download the checkpoint again, or {NAME_THE_ORIGINAL}"
        )
    if len(codes.shape) != 2:
        raise CheckpointError(f"{codes.name[-100:]} is {codes.dtype} {list(codes.shape)}, expected a matrix")
    if scale.dtype not in _BYTE_SCALES:
        raise CheckpointError(f"{scale.name[-100:]} is {scale.dtype}, expected one of {', '.join(_BYTE_SCALES)}")
    rows, columns = codes.shape
    blocks = (128, 128) if by is None else by.weight_block_size
    if by and by.group_size:
        blocks = 1, by.group_size
    grids = {
        (1, 1): (rows, columns),
        (rows, 1): (1, columns),
        (-(-rows // blocks[0]), -(-columns // blocks[1])): blocks,
    }
    block, grid = checked(codes, scale, grids, f"blocks of {blocks[0]} x {blocks[1]}")
    return Coded(codes, scale, block, grid, values=codes.dtype)
