"""`reasoning.json`: what an app has to know to tell a thought from an answer, and how its authors want text sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from toolkit.bundle.stop_tokens import StopToken
from toolkit.checkpoint.side_files import Sampling, SideFiles

REASONING_FILE: Final = "reasoning.json"
BEGIN_OF_THOUGHT: Final = "<think>"
END_OF_THOUGHT: Final = "</think>"


@dataclass(frozen=True)
class Marker:
    """A marker's text, and its id where it is a single token."""

    text: str
    id: int | None = None


@dataclass(frozen=True)
class Reasoning:
    """What `reasoning.json` holds. The markers are absent for a model that does not think; `prompt_opens_thought` says
    that the prompt ends inside a thought, so that the answer begins in one without a marker."""

    schema_version: int
    begin_of_thought: Marker | None
    end_of_thought: Marker | None
    prompt_opens_thought: bool
    stop_tokens: tuple[StopToken, ...]
    sampling: Sampling


def reasoning(
    side: SideFiles, template: str, prompt_opens_thought: bool, stop_tokens: tuple[StopToken, ...]
) -> Reasoning:
    """What the checkpoint's files say; a model thinks if its vocabulary has the markers, or its template names one."""
    ids = {
        text: side.vocabulary.id_of(text) if side.vocabulary else None for text in (BEGIN_OF_THOUGHT, END_OF_THOUGHT)
    }
    thinks = END_OF_THOUGHT in template or all(number is not None for number in ids.values())
    begin, end = (Marker(text, number) if thinks else None for text, number in ids.items())
    return Reasoning(1, begin, end, prompt_opens_thought and thinks, stop_tokens, side.generation.sampling)
