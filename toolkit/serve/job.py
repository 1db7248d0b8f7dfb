"""What the server and the process of a bundle tell each other, a JSON object a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from toolkit.evaluate.text_model import TextOptions, Written
from toolkit.evaluate.thought import ScoredToken
from toolkit.typed_json import Json, to_json

# The kinds of an event that end a job; `ready` is the first a process says, the others are pieces of text.
WRITTEN, REFUSED, FAILED = "written", "refused", "failed"
READY: Final = "ready"
ENDS: Final = frozenset({WRITTEN, REFUSED, FAILED})


@dataclass(frozen=True)
class Job:
    """One text to write: after `prompt` as it stands, or after `messages` by the chat template.

    `messages` and `tools` are JSON arrays as the chat template takes them, spelt as text.
    """

    number: int
    options: TextOptions
    prompt: str | None = None
    messages: str = "[]"
    tools: str = "[]"


@dataclass(frozen=True)
class Told:
    """A line to the process: a job to begin, or the number of one to stop."""

    job: Job | None = None
    stop: int | None = None


@dataclass(frozen=True)
class Event:
    """A line from the process: a piece of text (`kind` is `thought` or `answer`), or how something ended."""

    kind: str
    text: str = ""
    tokens: tuple[ScoredToken, ...] = ()
    written: Written | None = None


def line(value: Json) -> bytes:
    """The line that carries a dataclass, ASCII whatever it says."""
    return json.dumps(to_json(value)).encode("ascii") + b"\n"
