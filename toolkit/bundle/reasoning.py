"""`reasoning.json`: what an app has to know to tell a thought from an answer, and how its authors want text sampled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolkit.bundle.stop_tokens import StopToken
from toolkit.checkpoint.side_files import Sampling, SideFiles
from toolkit.errors import BundleError
from toolkit.files import read_json
from toolkit.typed_json import from_json

REASONING_FILE: Final = "reasoning.json"
BEGIN_OF_THOUGHT: Final = "<think>"
END_OF_THOUGHT: Final = "</think>"
_MAX_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Marker:
    """A marker's text, and its id where it is a single token."""

    text: str
    id: int | None = None


@dataclass(frozen=True, kw_only=True)
class Reasoning:
    """What `reasoning.json` holds. The markers are absent for a model that does not think; `prompt_opens_thought` says
    that the prompt ends inside a thought, so that the answer begins in one without a marker."""

    schema_version: int
    begin_of_thought: Marker | None = None
    end_of_thought: Marker | None = None
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
    return Reasoning(
        schema_version=1,
        begin_of_thought=begin,
        end_of_thought=end,
        prompt_opens_thought=prompt_opens_thought and thinks,
        stop_tokens=stop_tokens,
        sampling=side.generation.sampling,
    )


def read_reasoning(bundle: Path) -> Reasoning | None:
    """What a bundle's `reasoning.json` says; None where it has none, as bundles of random weights have none. Raises
    BundleError for one that cannot be read."""
    path = bundle / REASONING_FILE
    if not path.is_file():
        return None
    try:
        return from_json(Reasoning, read_json(path, _MAX_BYTES, BundleError, "an export writes one"), str(path))
    except ValueError as problem:
        raise BundleError(f"{problem}: export it again") from None
