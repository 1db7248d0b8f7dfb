"""What processes of the shelf tell the server, a JSON object a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from toolkit.typed_json import to_json

STEP: Final = "step"
NOTE: Final = "note"
# The kinds that end a job or answer a look.
ROWS, MADE, FAILED = "rows", "made", "failed"
ENDS: Final = frozenset({ROWS, MADE, FAILED})
# The phase whose steps are bytes.
DOWNLOAD: Final = "download"


@dataclass(frozen=True)
class ShelfEvent:
    """How a job goes: `text` is a step's phase, a note, rows as JSON, the folder that was made, or why it failed."""

    kind: str
    text: str = ""
    done: int = 0
    total: int = 0


def event_line(event: ShelfEvent) -> bytes:
    """The line that carries an event, ASCII whatever it says."""
    return json.dumps(to_json(event)).encode("ascii") + b"\n"
