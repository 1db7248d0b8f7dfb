"""How weights are rounded: one row an algorithm, which everything else asks instead of comparing names.

A row says what an algorithm needs and serves, and names the compiled functions that choose its scales (they live in
`quant/kernel.py` and `quant/signed_kernel.py`, so that reading a recipe compiles nothing).
docs/how-to/quantizer.md adds one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

# What a rule says that leaves the algorithm to the recipe's quality.
AUTO: Final = "auto"


class MatrixUse(Enum):
    """What a matrix is for: a linear multiplies its input, an expert's multiplies that of the tokens which come to it,
    an embedding is looked up, a tied embedding is both."""

    LINEAR = "linear"
    EXPERT = "expert"
    EMBEDDING = "embedding"
    TIED_EMBEDDING = "tied embedding"


_READS_INPUT: Final = (MatrixUse.LINEAR, MatrixUse.EXPERT, MatrixUse.TIED_EMBEDDING)


@dataclass(frozen=True)
class Algorithm:
    """One way to round a matrix.

    `scales` and `signed_scales` name the functions of `quant/kernel.py` and `quant/signed_kernel.py` that choose a
    scale for each block. `reads_text` is whether errors are weighed by the second moments that a calibration text
    leaves at each column, `solves` whether columns are rounded one after the other against them (`quant/gptq.py`);
    then `scales` round what cannot be solved. It serves matrices of `bits` that are `used` so; any other gets the
    algorithm named by `otherwise`.
    """

    name: str
    scales: str
    signed_scales: str = "searched_signed_scales"
    reads_text: bool = False
    solves: bool = False
    bits: tuple[int, ...] = (4, 8)
    used: tuple[MatrixUse, ...] = tuple(MatrixUse)
    otherwise: str = ""

    def suited(self, bits: int, use: MatrixUse) -> Algorithm:
        """This algorithm where it serves such a matrix, else the first down the line of `otherwise` that does."""
        serves = bits in self.bits and use in self.used
        return self if serves else ALGORITHMS[self.otherwise].suited(bits, use)


_ROWS: Final = (
    # The range of each block.
    Algorithm("rtn", scales="range_scales", signed_scales="range_signed_scales"),
    # The best of several ranges, errors weighed by the size of the weights.
    Algorithm("kquant", scales="searched_scales"),
    # The same search, errors weighed by the text.
    Algorithm("imatrix", scales="searched_scales", reads_text=True, used=_READS_INPUT, otherwise="kquant"),
    # 8 bits leave GPTQ nothing to do, and rows of an embedding are looked up, not multiplied. A tied one is solved as
    # the head that it is: what that costs the rows looked up is a hundredth of what it saves. An expert is solved by
    # the tokens that come to it, and searched where these are too few (LOG.md).
    Algorithm(
        "gptq",
        scales="searched_scales",
        reads_text=True,
        solves=True,
        bits=(4,),
        used=_READS_INPUT,
        otherwise="imatrix",
    ),
)
ALGORITHMS: Final[dict[str, Algorithm]] = {row.name: row for row in _ROWS}
# Those that a bundle may be made with when no text is read.
DATA_FREE: Final = tuple(row.name for row in _ROWS if not row.reads_text)
