"""A checkpoint as rounding leaves it, for the reference to compute with: quantization error without a graph.

`plain_rounding` is what a better quantizer has to beat, measured beside it in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.weights import Tensors
from toolkit.jit import require_compiler
from toolkit.quant.blockwise import QuantSpec, dequantize_blocks, quantize_blocks

PLAIN: Final = QuantSpec(bits=4, block_size=32, symmetric=True, algorithm="rtn")
PLAIN_NAME: Final = "rtn, 4 bits, block 32, symmetric"
PLAIN_BITS_PER_WEIGHT: Final = 4 + 32 / 32


class RoundedTensors:
    """A source's tensors, every matrix quantized by `spec_of(tensor name)` and dequantized again."""

    def __init__(self, source: Tensors, spec_of: Callable[[str], QuantSpec]) -> None:
        self._source, self._spec_of = source, spec_of

    def names(self) -> list[str]:
        """Lists the names that the source has."""
        return self._source.names()

    def read(self, name: str) -> NDArray[np.float32]:
        """Reads a whole tensor, rounded where a format is given."""
        return self._rounded(name, self._source.read(name))

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of a tensor: blocks never cross them."""
        return self._rounded(name, self._source.read_rows(name, start, stop))

    def _rounded(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        if values.ndim != 2:
            return values
        spec = self._spec_of(name)
        return dequantize_blocks(quantize_blocks(values, spec), spec, values.shape[1])


def plain_rounding(source: Tensors) -> RoundedTensors:
    """`source` with every matrix rounded to symmetric 4-bit blocks of 32, llama.cpp's Q4_0.

    Raises MachineError where numba is missing, before anything has been read.
    """
    require_compiler()
    return RoundedTensors(source, _plain)


def _plain(_: str) -> QuantSpec:
    """A function of the module, so that it can be sent to another process."""
    return PLAIN
