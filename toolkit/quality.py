"""How much an export may cost for its weights' sake: what `auto` means as an algorithm, and how much text is read.

`fast` needs no data. `balanced` reads some text, folds salient channels away (AWQ) and solves matrices one after the
other (GPTQ). `best` reads three times as much, solves experts too, and visits columns again. How many tokens suffice
was measured on a real model (LOG.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Quality:
    """`algorithm` names the row of ALGORITHMS (algorithms.py) for matrices whose rule says `auto`, `experts` that for
    experts; `tokens` is the calibration text's length, 0 for none. GPTQ takes at most `wide_tokens` of them, 0 for all,
    of an input of more than twice as many channels; `revisits` is how often solved columns are visited again."""

    algorithm: str
    experts: str
    tokens: int
    wide_tokens: int = 0
    revisits: int = 0


QUALITIES: Final[dict[str, Quality]] = {
    "fast": Quality("kquant", "kquant", 0),
    # From so few tokens solving experts gained nothing, and takes ten times what searching does (LOG.md).
    # What a wide input takes grows with the square of its tokens: 1,536 cost it 2 to 5% more error (LOG.md).
    "balanced": Quality("gptq", "imatrix", 2560, wide_tokens=1536),
    "best": Quality("gptq", "gptq", 8192, revisits=2),
}
