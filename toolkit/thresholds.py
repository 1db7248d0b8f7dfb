"""How far from its checkpoint a bundle may be, where a recipe leaves that to what trained models of its size lose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

# A model of at most so many parameters loses so many times what Qwen2.5-Coder-0.5B-Instruct does, at a target's own
# rules: stories260k, SmolLM2-135M, Coder-0.5B and Coder-1.5B were measured (docs/measured.md). Larger models are held
# to the last, which they are below.
_LOSSES: Final = ((50e6, 1.0), (250e6, 3.9), (1e9, 1.0), (math.inf, 1.1))
# A bundle may lose twice as much before it fails: plain rounding loses 2.4 times as much and more. Beyond 1 G
# parameters it is nearer to a CPU's larger blocks, whose threshold is 1.5 times what Coder-1.5B loses by them.
_ROOM: Final = 2.0


def kld_threshold(measured: float, parameters: int) -> float:
    """The largest mean KLD, in nats a token and to two digits, of a model of so many parameters, where Coder-0.5B was
    `measured` by the same rules."""
    loss = next(loss for most, loss in _LOSSES if parameters <= most)
    return float(f"{_ROOM * measured * loss:.2g}")


def resolved(thresholds: Mapping[str, float | str], measured: float, parameters: int) -> dict[str, float]:
    """Figures with their thresholds in numbers: a word, which only mean_kld may have, leaves it to the size."""
    return {
        figure: kld_threshold(measured, parameters) if isinstance(limit, str) else limit
        for figure, limit in thresholds.items()
    }
