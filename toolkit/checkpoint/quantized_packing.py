"""How weights of eight bits and fewer are packed into tensors: where codes, scales and zero points of one stand.

Layouts by the programs that write them: AutoGPTQ and GPTQModel (`qweight` packs input features, [in/8, out]), AutoAWQ
(output features in an order of its own, [in, out/8]), compressed-tensors (`weight_packed` along a row), and pairs of
FP4 in bytes (ModelOpt, compressed-tensors; gpt-oss, whose experts of a layer are one tensor).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from toolkit.checkpoint.other_formats import NAME_THE_ORIGINAL
from toolkit.checkpoint.quantized_config import QuantizedBy
from toolkit.checkpoint.safetensors import TensorRef
from toolkit.errors import CheckpointError, UnsupportedError

Layout = Literal["bytes", "nibbles", "gptq", "awq", "experts"]
Parts = Mapping[str, TensorRef]
Shape = tuple[int, int]
_WORD: Final = 32
_FLOATS: Final = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Coded:
    """One weight's codes, of the weight's own shape, and their scales: one for each `block` of rows and columns, in a
    grid of the shape `scales`.

    `values` names what a code stands for. Where there are `zeros` (packed as codes of as many `bits`) it stands for
    code - zero, times the scale. `groups` has the column of the grid for each column of the weight; `outer` is one more
    scale for the whole weight, which `outer_divides` where it does not multiply; `zero_bias` is a bias beside a linear
    that has none, all zeros.
    """

    codes: TensorRef
    scale: TensorRef
    block: Shape
    scales: Shape
    values: str
    layout: Layout = "bytes"
    bits: int = 8
    zeros: TensorRef | None = None
    zeros_less_one: bool = False
    groups: TensorRef | None = None
    outer: TensorRef | None = None
    outer_divides: bool = False
    zero_bias: TensorRef | None = None

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all its parts."""
        parts = (self.codes, self.scale, self.zeros, self.groups, self.outer)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def by_columns(self) -> bool:
        """Tells whether a row of the weight is a column of its codes, so that rows come from the whole of these."""
        return self.layout in ("gptq", "awq")


def gptq_codes(name: str, shape: Shape, parts: Parts, by: QuantizedBy) -> Coded:
    """GPTQ's: eight input features in a word of 32 bits, all zero points (less one in its first version) in words along
    the output, and the group of each input feature in g_idx."""
    rows, columns = shape
    words = parts["qweight"]
    bits = _bits(words, _WORD * words.shape[0] // columns if words.shape else 0)
    _expect(words, "I32", (-(-columns * bits // _WORD), rows))
    grid = _groups(columns, by), rows
    scale = _expect(_part(parts, "scales", name), "", grid)
    zeros = _expect(_part(parts, "qzeros", name), "I32", (grid[0], -(-rows * bits // _WORD)))
    groups = parts.get("g_idx")
    if groups is not None:
        _expect(groups, "I32", (columns,))
    return Coded(
        codes=_as_weight(words, name, f"INT{bits}", shape),
        scale=scale,
        block=(1, by.group_size or columns),
        scales=(rows, grid[0]),
        values=f"INT{bits}",
        layout="gptq",
        bits=bits,
        zeros=zeros,
        zeros_less_one=by.zeros_less_one,
        groups=groups,
    )


def awq_codes(name: str, shape: Shape, parts: Parts, by: QuantizedBy) -> Coded:
    """AWQ's: eight output features in a word of 32 bits, in the order 0, 2, 4, 6, 1, 3, 5, 7, zero points like them."""
    rows, columns = shape
    words = _expect(parts["qweight"], "I32", (columns, -(-rows * 4 // _WORD)))
    grid = _groups(columns, by), rows
    return Coded(
        codes=_as_weight(words, name, "INT4", shape),
        scale=_expect(_part(parts, "scales", name), "", grid),
        block=(1, by.group_size or columns),
        scales=(rows, grid[0]),
        values="INT4",
        layout="awq",
        bits=4,
        zeros=_expect(_part(parts, "qzeros", name), "I32", (grid[0], -(-rows * 4 // _WORD))),
    )


def packed_codes(name: str, shape: Shape, parts: Parts, by: QuantizedBy | None) -> Coded:
    """compressed-tensors' integers: words of 32 bits along a row, codes around the middle of their range or with zero
    points, which are packed along the output."""
    rows, columns = shape
    words = parts["weight_packed"]
    fitting = [bits for bits in (4, 8) if words.shape == (rows, -(-columns * bits // _WORD))]
    if words.dtype != "I32" or not fitting:
        raise _misshapen(words, f"I32 [{rows}, {columns} / 8] of 4 bits or [{rows}, {columns} / 4] of 8")
    bits = fitting[0]
    codes = _as_weight(words, name, f"INT{bits}", shape)
    scale = _part(parts, "weight_scale", name)
    size = by.group_size if by and by.group_size else columns
    grids = {(1, 1): shape, (rows, 1): (1, columns), (rows, -(-columns // size)): (1, size)}
    block, scales = checked(codes, scale, grids, f"groups of {size}")
    zeros, per = parts.get("weight_zero_point"), _WORD // bits
    if zeros is not None and zeros.dtype == "I8":
        _expect(zeros, "I8", scales)
    elif zeros is not None:
        _expect(zeros, "I32", (-(-scales[0] // per), scales[1]))
    groups = parts.get("weight_g_idx")
    if groups is not None:
        _expect(groups, "I32", (columns,))
    layout: Layout = "nibbles" if bits == 4 else "bytes"
    return Coded(codes, scale, block, scales, f"INT{bits}", layout, bits, zeros, groups=groups)


def fp4_codes(name: str, shape: Shape, pairs: TensorRef, parts: Parts) -> Coded:
    """FP4 in pairs: NVIDIA's with an E4M3 scale for 16 weights and one more for all, which multiplies under ModelOpt's
    name and divides under compressed-tensors'; MXFP4 with a power of two for 32."""
    rows, columns = shape
    _expect(pairs, "U8", (rows, -(-columns // 2)))
    scale = _part(parts, "weight_scale", name)
    outer = parts.get("weight_scale_2", parts.get("weight_global_scale"))
    nvidia = scale.dtype == "F8_E4M3"
    if nvidia and outer is None:
        raise CheckpointError(
            f"{name[-100:]} is NVFP4, and its second scale is missing, expected weight_scale_2 or weight_global_scale "
            "beside it: download the checkpoint again"
        )
    if outer is not None and (outer.dtype != "F32" or outer.nbytes != 4):
        raise _misshapen(outer, "one F32")
    kind, size = ("NVFP4", 16) if nvidia else ("MXFP4", 32)
    _expect(scale, "F8_E4M3" if nvidia else "U8", (rows, -(-columns // size)))
    codes = _as_weight(pairs, name, kind, shape)
    grid = (rows, -(-columns // size))
    divides = "weight_scale_2" not in parts
    return Coded(codes, scale, (1, size), grid, "E2M1", "nibbles", 4, outer=outer, outer_divides=divides)


def experts_codes(name: str, shape: tuple[int, ...], parts: Parts) -> Coded:
    """MXFP4 of gpt-oss: experts [experts, input, output], stored as `_blocks` [experts, output, input / 32, 16] of
    pairs along the input, and `_scales` without the last axis."""
    experts, columns, rows = shape
    pairs = _expect(parts["_blocks"], "U8", (experts, rows, -(-columns // 32), 16))
    scale = _expect(_part(parts, "_scales", name), "U8", pairs.shape[:3])
    codes = replace(pairs, name=name, dtype="MXFP4", shape=shape)
    return Coded(codes, scale, (1, 32), (experts * rows, -(-columns // 32)), "E2M1", "experts", 4)


def checked(codes: TensorRef, scale: TensorRef, grids: Mapping[Shape, Shape], words: str) -> tuple[Shape, Shape]:
    """The block of weights that share a scale and the grid of scales, by the scale's shape, one of `grids`.

    Raises CheckpointError for another shape; `words` say what the last of the grids is.
    """
    given = scale.shape
    shape = (given[0], given[1]) if len(given) == 2 else (given[0], 1) if len(given) == 1 else (1, 1)
    if len(given) > 2 or shape not in grids:
        expected = " or ".join(str(list(grid)) for grid in grids)
        raise CheckpointError(
            f"{scale.name[-100:]} is {scale.dtype} {list(given)} beside {list(codes.shape)} weights, expected "
            f"{expected} ({words})"
        )
    return grids[shape], shape


def _as_weight(codes: TensorRef, name: str, dtype: str, shape: Shape) -> TensorRef:
    """The codes as the weight that they are: its name and its shape, the bytes where they were."""
    return replace(codes, name=name, dtype=dtype, shape=shape)


def _bits(words: TensorRef, bits: int) -> int:
    if bits not in (2, 4, 8):
        raise UnsupportedError(
            f"{words.name[-100:]} {list(words.shape)} holds {bits} bits a weight, expected 2, 4 or 8: "
            f"{NAME_THE_ORIGINAL}"
        )
    return bits


def _groups(columns: int, by: QuantizedBy) -> int:
    return -(-columns // (by.group_size or columns))


def _part(parts: Parts, part: str, name: str) -> TensorRef:
    """A part that has to be there."""
    if part not in parts:
        raise CheckpointError(
            f"{name[-100:]} is quantized, and {part} is missing beside its codes: download the checkpoint again, or "
            f"{NAME_THE_ORIGINAL}"
        )
    return parts[part]


def _expect(ref: TensorRef, dtype: str, shape: tuple[int, ...]) -> TensorRef:
    """The tensor, of this shape and dtype, or of any floats where none is given."""
    if ref.shape != shape or ref.dtype not in ((dtype,) if dtype else _FLOATS):
        raise _misshapen(ref, f"{dtype or '/'.join(_FLOATS)} {list(shape)}")
    return ref


def _misshapen(ref: TensorRef, expected: str) -> CheckpointError:
    return CheckpointError(f"{ref.name[-100:]} is {ref.dtype} {list(ref.shape)}, expected {expected} by config.json")
