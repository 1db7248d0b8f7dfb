"""How much an export may cost for its weights' sake: what `auto` means as an algorithm, and how much text is read.

`fast` needs no data. `balanced` reads some text, folds salient channels away (AWQ) and solves matrices one after the
other (GPTQ). `best` reads three times as much, six times for a small model, solves experts too, and visits columns
again. How many tokens suffice was measured on real models (LOG.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# A model of 135 M parameters has a twentieth less KLD by twice the text, which takes it two to three minutes (LOG.md).
_SMALL: Final = 200_000_000


@dataclass(frozen=True)
class Quality:
    """`algorithm` names the row of ALGORITHMS (algorithms.py) for matrices whose rule says `auto`, `experts` that for
    experts; `tokens` is the calibration text's length, 0 for none, and a small model's `small_tokens` where that is
    another. GPTQ takes at most `wide_tokens` of them, 0 for all, of an input of more than twice as many channels;
    `revisits` is how often solved columns are visited again."""

    algorithm: str
    experts: str
    tokens: int
    small_tokens: int = 0
    wide_tokens: int = 0
    revisits: int = 0

    def tokens_for(self, parameters: int) -> int:
        """Returns how much text is read for a model of so many parameters."""
        return self.small_tokens if self.small_tokens and parameters <= _SMALL else self.tokens


QUALITIES: Final[dict[str, Quality]] = {
    "fast": Quality("kquant", "kquant", 0),
    # From so few tokens solving experts gained nothing, and takes ten times what searching does (LOG.md).
    # What a wide input takes grows with the square of its tokens: 1,536 cost it 2 to 5% more error (LOG.md).
    "balanced": Quality("gptq", "imatrix", 2560, wide_tokens=1536),
    "best": Quality("gptq", "gptq", 8192, small_tokens=16384, revisits=2),
}
