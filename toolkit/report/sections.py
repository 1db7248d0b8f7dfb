"""The sections of a report, frozen: what was measured, or why it was not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NotMeasured:
    """A figure or section that is absent from a report, by its name there, and the reason."""

    name: str
    reason: str
