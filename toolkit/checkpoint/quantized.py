"""Rows of codes as rows of floats: what a source of tensors does where its files hold codes and scales."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.quantized_blocks import (
    AWQ_PLACES,
    E4M3,
    E8M0,
    TABLES,
    decode_blocks,
    decode_groups,
    unpack_awq,
    unpack_gptq,
    unpack_pairs,
)
from toolkit.checkpoint.quantized_packing import Coded
from toolkit.checkpoint.safetensors import TensorRef
from toolkit.checkpoint.scan import ReadBytes, read_exactly
from toolkit.checkpoint.widen import widen
from toolkit.errors import CheckpointError, NonFiniteError

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
_T = TypeVar("_T")
# Scales are read once for the rows of a tensor that stream by; threads and readers may be at several tensors.
_KEPT: Final = 4
# Scales that are at most one in so many bytes of their codes are looked at before anything is written.
_FEW: Final = 64
_FOUR_BITS: Final = np.arange(0, 32, 4, dtype=np.uint32)


@dataclass(frozen=True)
class _Grid:
    """A tensor's scales, and where it has zero points or columns out of order these, of the same shape, and the column
    of the grid for each of the weight's."""

    scales: Floats
    zeros: Floats | None = None
    groups: NDArray[np.int64] | None = None


class Dequantizer:
    """Dequantizes the `coded` tensors of some files; what it reads of their scales is counted in `read`."""

    def __init__(self, coded: Mapping[str, Coded], read: ReadBytes) -> None:
        self._coded, self._read = coded, read
        self._grids: OrderedDict[str, _Grid] = OrderedDict()
        self._whole: OrderedDict[str, Bytes] = OrderedDict()
        self._lock = Lock()

    def by_columns(self, name: str) -> bool:
        """Whether rows of a tensor come from the whole of its codes alone."""
        return name in self._coded and self._coded[name].by_columns

    def whole(self, name: str) -> Bytes:
        """All codes of a tensor as stored; the last that were asked for are kept."""
        return self._kept(self._whole, name, lambda: self._bytes(self._coded[name].codes))

    def floats(self, ref: TensorRef, raw: Bytes, start: int, stop: int) -> Floats:
        """Rows [start, stop) of a tensor as flat float32; `raw` has them as stored, or all codes `by_columns`.

        Raises NonFiniteError for a scale that is NaN or infinite, MachineError for codes without numba.
        """
        coded = self._coded.get(ref.name)
        if coded is None:
            return widen(raw, ref.dtype)
        if start == stop:
            return np.empty(0, np.float32)
        if coded.layout == "experts":
            return self._experts(ref, coded, raw, start, stop)
        codes, grid = _codes(coded, raw, start, stop), self._grid(ref.name)
        if grid.zeros is None or grid.groups is None:
            return decode_blocks(codes, TABLES[coded.values], grid.scales, coded.block, start).reshape(-1)
        rows = slice(start, stop) if len(grid.scales) > 1 else np.zeros(stop - start, np.int64)
        return decode_groups(codes, grid.zeros[rows], grid.scales[rows], grid.groups).reshape(-1)

    def _experts(self, ref: TensorRef, coded: Coded, raw: Bytes, start: int, stop: int) -> Floats:
        """Experts [start, stop), input features first; they are stored output features first."""
        columns, rows = ref.shape[1:]
        codes = unpack_pairs(raw.reshape((stop - start) * rows, -1), columns)
        scales = self._grid(ref.name).scales
        values = decode_blocks(codes, TABLES[coded.values], scales, coded.block, start * rows)
        return np.ascontiguousarray(values.reshape(-1, rows, columns).transpose(0, 2, 1)).reshape(-1)

    def check_scales(self) -> None:
        """Reads the scales of tensors that have few, and biases that should be zeros; raises NonFiniteError for a scale
        that is NaN or infinite, CheckpointError for a bias that is none."""
        for name, coded in self._coded.items():
            if coded.scale.nbytes * _FEW <= coded.codes.nbytes:
                self._grid(name)
            if coded.zero_bias is not None and self._floats(coded.zero_bias).any():
                raise CheckpointError(
                    f"{coded.zero_bias.name} is not zero, and config.json calls for no bias there: it is another "
                    "model's, or lacks attention_bias or mlp_bias"
                )

    def _grid(self, name: str) -> _Grid:
        return self._kept(self._grids, name, lambda: self._read_grid(self._coded[name]))

    def _kept(self, kept: OrderedDict[str, _T], name: str, read: Callable[[], _T]) -> _T:
        """What is read of a tensor, from those last read where it is among them."""
        with self._lock:
            if name in kept:
                kept.move_to_end(name)
                return kept[name]
        value = read()
        with self._lock:
            kept[name] = value
            while len(kept) > _KEPT:
                kept.popitem(last=False)
        return value

    def _read_grid(self, coded: Coded) -> _Grid:
        """A tensor's scales and zero points by rows, as floats."""
        scales = self._floats(coded.scale)
        if coded.outer is not None:
            outer = self._floats(coded.outer)[0]
            scales = scales / outer if coded.outer_divides else scales * outer
        if bad := int(np.count_nonzero(~np.isfinite(scales))):
            raise NonFiniteError(
                f"{coded.scale.name} holds {bad} NaN or infinite scales: it was published so, or is damaged: compare "
                "its hash"
            )
        rows, columns = coded.scales
        scales = np.ascontiguousarray(scales.reshape(columns, rows).T) if coded.by_columns else scales.reshape(rows, -1)
        if coded.zeros is None and coded.groups is None:
            return _Grid(scales)
        middle = np.full(scales.shape, 1 << (coded.bits - 1), np.float32)
        zeros = middle if coded.zeros is None else _zeros(coded, self._bytes(coded.zeros), coded.zeros.dtype)
        return _Grid(scales, zeros, self._groups(coded))

    def _groups(self, coded: Coded) -> NDArray[np.int64]:
        """The column of the grid for each column of the weight."""
        width = coded.codes.shape[1]
        if coded.groups is None:
            return np.arange(width) // coded.block[1]
        groups = self._bytes(coded.groups).view("<i4").astype(np.int64)
        if groups.min() < 0 or groups.max() >= coded.scales[1]:
            raise CheckpointError(
                f"{coded.groups.name} names groups from {groups.min()} to {groups.max()}, expected 0 to "
                f"{coded.scales[1] - 1}: it is damaged, download it again"
            )
        return groups

    def _bytes(self, ref: TensorRef) -> Bytes:
        return read_exactly(ref.path, ref.offset, ref.nbytes, self._read)

    def _floats(self, ref: TensorRef) -> Floats:
        raw = self._bytes(ref)
        if ref.dtype == "F8_E4M3":
            return E4M3[raw]
        return E8M0[raw] if ref.dtype in ("F8_E8M0", "U8") else widen(raw, ref.dtype)


def _codes(coded: Coded, raw: Bytes, start: int, stop: int) -> Bytes:
    """Rows [start, stop) of a tensor, a byte a code."""
    rows, columns = coded.codes.shape
    if coded.layout == "gptq":
        return unpack_gptq(raw.view("<u4").reshape(-1, rows), coded.bits, start, stop, columns)
    if coded.layout == "awq":
        return unpack_awq(raw.view("<u4").reshape(columns, -1), start, stop)
    stored = raw.reshape(stop - start, -1)
    return unpack_pairs(stored, columns) if coded.layout == "nibbles" else stored[:, :columns]


def _zeros(coded: Coded, raw: Bytes, dtype: str) -> Floats:
    """Zero points by rows and groups, as the codes count."""
    rows, groups = coded.scales
    if dtype == "I8":
        return raw.view(np.int8).reshape(rows, groups).astype(np.float32) + np.float32(1 << (coded.bits - 1))
    words, mask = raw.view("<u4"), (1 << coded.bits) - 1
    places = np.arange(0, 32, coded.bits, dtype=np.uint32)
    if coded.layout == "awq":
        found = words.reshape(groups, -1, 1) >> _FOUR_BITS[AWQ_PLACES] & mask
    elif coded.layout == "gptq":
        # As GPTQModel, which counts words, not codes: what is borrowed from a neighbour goes back to it.
        more = np.uint32(sum(1 << int(place) for place in places)) if coded.zeros_less_one else np.uint32(0)
        found = (words.reshape(groups, -1, 1) + more) >> places & mask
    else:
        found = words.reshape(-1, 1, groups) >> places[:, None] & mask
        return np.ascontiguousarray(found.reshape(-1, groups)[:rows], np.float32)
    return np.ascontiguousarray(found.reshape(groups, -1)[:, :rows].T, np.float32)
