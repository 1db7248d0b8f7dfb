"""Which of a checkpoint's tensors are codes and scales, and the weights that they make together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from toolkit.checkpoint.other_formats import NAME_THE_ORIGINAL
from toolkit.checkpoint.quantized_config import QuantizedBy
from toolkit.checkpoint.safetensors import TensorRef
from toolkit.checkpoint.stored_as import StoredAs
from toolkit.errors import CheckpointError

# The tensors beside a module's weight, in the order in which a scale is looked for, and what a runtime alone reads.
_SCALES: Final = ("weight_scale_inv", "weight_scale")
_UNREAD: Final = ("input_scale", "activation_scale", "output_scale", "input_scale_ub", "input_zero_point")
_PARTS: Final = (*_SCALES, *_UNREAD)
# The dtypes of codes that a byte holds, and of scales.
_BYTES: Final = ("F8_E4M3", "I8")
_SCALE_DTYPES: Final = ("F32", "BF16", "F16", "F8_E8M0")
CODES: Final = _BYTES


@dataclass(frozen=True)
class Coded:
    """One weight's codes and their scales, one for each `block` of rows and columns in a grid of the shape `scales`."""

    codes: TensorRef
    scale: TensorRef
    block: tuple[int, int]
    scales: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all its parts."""
        return self.codes.nbytes + self.scale.nbytes


def coded_tensors(
    refs: Mapping[str, TensorRef], by: QuantizedBy | None, wanted: Collection[str]
) -> tuple[dict[str, TensorRef], dict[str, Coded]]:
    """The tensors without those that stand beside codes, and the wanted weights that are codes, by name.

    Raises CheckpointError for codes without their scale, or with one of another shape or dtype.
    """
    left = dict(refs)
    coded: dict[str, Coded] = {}
    for name, ref in refs.items():
        if ref.dtype not in _BYTES or not name.endswith(".weight"):
            continue
        beside = {part: refs[whole] for part in _PARTS if (whole := f"{name.removesuffix('weight')}{part}") in refs}
        for part in beside.values():
            left.pop(part.name)
        if name in wanted:
            coded[name] = _bytes(ref, beside, by)
    return left, coded


def stored_as(refs: Mapping[str, TensorRef], coded: Mapping[str, Coded], by: QuantizedBy | None) -> StoredAs | None:
    """What a checkpoint's tensors are, some of which are coded; None where none is."""
    kinds = Counter(ref.dtype for ref in refs.values())
    if not coded:
        return None
    nbytes = sum(coded[name].nbytes if name in coded else ref.nbytes for name, ref in refs.items())
    weights = sum(math.prod(ref.shape) for ref in refs.values())
    words = by.words if by else next(iter(coded.values())).codes.dtype
    return StoredAs(words, round(8 * nbytes / weights, 3), dict(kinds.most_common()))


def _bytes(codes: TensorRef, beside: Mapping[str, TensorRef], by: QuantizedBy | None) -> Coded:
    scale = next((beside[part] for part in _SCALES if part in beside), None)
    if scale is None:
        expected = " or ".join(f"{codes.name}{part.removeprefix('weight')}" for part in _SCALES)
        raise CheckpointError(
            f"{codes.name[-100:]} is {codes.dtype} {list(codes.shape)} and quantized, and its scale is missing, "
            f"expected {expected[-220:]}: download the checkpoint again, or {NAME_THE_ORIGINAL}"
        )
    if len(codes.shape) != 2:
        raise CheckpointError(f"{codes.name[-100:]} is {codes.dtype} {list(codes.shape)}, expected a matrix")
    if scale.dtype not in _SCALE_DTYPES:
        raise CheckpointError(f"{scale.name[-100:]} is {scale.dtype}, expected one of {', '.join(_SCALE_DTYPES)}")
    return Coded(codes, scale, *_grid(codes, scale, (128, 128) if by is None else by.weight_block_size))


def _grid(codes: TensorRef, scale: TensorRef, blocks: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rows and columns that share a scale, and how many scales there are along each; by the scale's shape."""
    rows, columns = codes.shape
    grids = {
        (1, 1): (rows, columns),
        (rows, 1): (1, columns),
        (-(-rows // blocks[0]), -(-columns // blocks[1])): blocks,
    }
    shape = scale.shape if len(scale.shape) == 2 else (*scale.shape, 1) if len(scale.shape) == 1 else (1, 1)
    if len(scale.shape) > 2 or shape not in grids:
        expected = " or ".join(str(list(grid)) for grid in grids)
        raise CheckpointError(
            f"{scale.name[-100:]} is {scale.dtype} {list(scale.shape)} beside {list(codes.shape)} weights, expected "
            f"{expected} (blocks of {blocks[0]} x {blocks[1]})"
        )
    return grids[shape[0], shape[1]], (shape[0], shape[1])
