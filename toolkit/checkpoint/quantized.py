"""Rows of codes as rows of floats: what a source of tensors does where its files hold codes and scales."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.quantized_blocks import E8M0, TABLES, decode_bytes
from toolkit.checkpoint.quantized_tensors import Coded
from toolkit.checkpoint.safetensors import TensorRef
from toolkit.checkpoint.scan import ReadBytes, read_exactly
from toolkit.checkpoint.widen import widen
from toolkit.errors import NonFiniteError

Floats = NDArray[np.float32]
# Scales are read once for the rows of a tensor that stream by; threads and readers may be at several tensors.
_SCALES_KEPT: Final = 8
# Scales that are at most one in so many bytes of their codes are looked at before anything is written.
_FEW: Final = 64


class Dequantizer:
    """Dequantizes the `coded` tensors of some files; what it reads of their scales is counted in `read`."""

    def __init__(self, coded: Mapping[str, Coded], read: ReadBytes) -> None:
        self._coded, self._read = coded, read
        self._scales: OrderedDict[str, Floats] = OrderedDict()
        self._lock = Lock()

    def floats(self, ref: TensorRef, raw: NDArray[np.uint8], first: int) -> Floats:
        """Rows of a tensor as flat float32, the first of which is row `first` of it; `raw` has them as stored.

        Raises NonFiniteError for a scale that is NaN or infinite, MachineError for codes without numba.
        """
        coded = self._coded.get(ref.name)
        if coded is None:
            return widen(raw, ref.dtype)
        codes = raw.reshape(-1, ref.shape[1])
        return decode_bytes(codes, TABLES[ref.dtype], self._scales_of(coded), coded.block, first).reshape(-1)

    def check_scales(self) -> None:
        """Reads the scales of tensors that have few; raises NonFiniteError for one that is NaN or infinite."""
        for coded in self._coded.values():
            if coded.scale.nbytes * _FEW <= coded.codes.nbytes:
                self._scales_of(coded)

    def _scales_of(self, coded: Coded) -> Floats:
        """All scales of a tensor in their grid."""
        scale = coded.scale
        with self._lock:
            if scale.name in self._scales:
                self._scales.move_to_end(scale.name)
                return self._scales[scale.name]
        raw = read_exactly(scale.path, scale.offset, scale.nbytes, self._read)
        values = E8M0[raw] if scale.dtype == "F8_E8M0" else widen(raw, scale.dtype)
        if bad := int(np.count_nonzero(~np.isfinite(values))):
            raise NonFiniteError(
                f"{scale.name} holds {bad} NaN or infinite scales: it was published so, or is damaged: compare its hash"
            )
        grid = values.reshape(coded.scales)
        with self._lock:
            self._scales[scale.name] = grid
            while len(self._scales) > _SCALES_KEPT:
                self._scales.popitem(last=False)
        return grid
