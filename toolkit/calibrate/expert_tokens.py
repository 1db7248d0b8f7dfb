"""What a report says of experts; apart from what computes it, so that who reads reports loads no compiler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertTokens:
    """How a text's tokens came to the experts of all layers, `experts` of them: the fewest that came to one, the
    median and the most. To `searched` came fewer than `needed`, so that their errors are weighed without the text."""

    experts: int
    fewest: int
    median: int
    most: int
    needed: int
    searched: int
