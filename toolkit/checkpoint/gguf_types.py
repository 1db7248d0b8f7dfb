"""How GGUF files number the types of values, of tensors and of whole files, and how many bytes a block of each takes.

Numbers and sizes as ggml.h and llama.h have them (enum ggml_type, enum llama_ftype), which never reuse one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class TensorType:
    """A way to store weights: `block` of them along a row take `nbytes`."""

    name: str
    block: int
    nbytes: int


_BLOCK: Final = 32
_SUPER_BLOCK: Final = 256
# By its number in the file. Types of integers and those that ggml only computes with are no weights.
TENSOR_TYPES: Final[dict[int, TensorType]] = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", _BLOCK, 18),
    3: TensorType("Q4_1", _BLOCK, 20),
    6: TensorType("Q5_0", _BLOCK, 22),
    7: TensorType("Q5_1", _BLOCK, 24),
    8: TensorType("Q8_0", _BLOCK, 34),
    10: TensorType("Q2_K", _SUPER_BLOCK, 84),
    11: TensorType("Q3_K", _SUPER_BLOCK, 110),
    12: TensorType("Q4_K", _SUPER_BLOCK, 144),
    13: TensorType("Q5_K", _SUPER_BLOCK, 176),
    14: TensorType("Q6_K", _SUPER_BLOCK, 210),
    16: TensorType("IQ2_XXS", _SUPER_BLOCK, 66),
    17: TensorType("IQ2_XS", _SUPER_BLOCK, 74),
    18: TensorType("IQ3_XXS", _SUPER_BLOCK, 98),
    19: TensorType("IQ1_S", _SUPER_BLOCK, 50),
    20: TensorType("IQ4_NL", _BLOCK, 18),
    21: TensorType("IQ3_S", _SUPER_BLOCK, 110),
    22: TensorType("IQ2_S", _SUPER_BLOCK, 82),
    23: TensorType("IQ4_XS", _SUPER_BLOCK, 136),
    29: TensorType("IQ1_M", _SUPER_BLOCK, 56),
    30: TensorType("BF16", 1, 2),
    34: TensorType("TQ1_0", _SUPER_BLOCK, 54),
    35: TensorType("TQ2_0", _SUPER_BLOCK, 66),
    39: TensorType("MXFP4", _BLOCK, 17),
    40: TensorType("NVFP4", 64, 36),
}
TYPE_BY_NAME: Final = {kind.name: kind for kind in TENSOR_TYPES.values()}

# What general.file_type says of a whole file.
FILE_TYPES: Final[dict[int, str]] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
}
