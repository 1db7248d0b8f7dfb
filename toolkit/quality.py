"""How much an export may cost for its weights' sake: what `auto` means as an algorithm, and how much text is read.

`fast` needs no data. `balanced` reads some text to fold salient channels away (AWQ) and to weigh the search (imatrix).
`best` reads enough for GPTQ in every matrix, and solves them one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Quality:
    """`algorithm` names the row of ALGORITHMS (algorithms.py) for matrices whose rule says `auto`; `tokens` is the
    calibration text's length, 0 for none."""

    algorithm: str
    tokens: int


QUALITIES: Final[dict[str, Quality]] = {
    "fast": Quality("kquant", 0),
    "balanced": Quality("imatrix", 4096),
    "best": Quality("gptq", 8192),
}
