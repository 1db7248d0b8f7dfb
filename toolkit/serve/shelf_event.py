"""What the process of the shelf tells the server, a JSON object a line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

STEP: Final = "step"
NOTE: Final = "note"
# The kinds that end a job.
ROWS, MADE, FAILED = "rows", "made", "failed"
# The phase whose steps are bytes.
DOWNLOAD: Final = "download"


@dataclass(frozen=True)
class ShelfEvent:
    """How a job goes: `text` is a step's phase, a note, rows as JSON, the folder that was made, or why it failed."""

    kind: str
    text: str = ""
    done: int = 0
    total: int = 0
