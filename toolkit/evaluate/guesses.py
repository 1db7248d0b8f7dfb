"""Tokens that are guessed ahead and checked several in a run, as onnxruntime-genai counts them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from toolkit.report.sections import Speculated
from toolkit.typed_json import Json

# Runs of the model's graph after the prompt, by onnxruntime-genai's own count.
_RUNS: Final = ("target_forward_passes", "standard_fallback_steps")


@dataclass(frozen=True)
class Guesses:
    """What came of the guesses of one text or several: how many were looked at and how many taken, the tokens that were
    written, and the runs of the model that it took."""

    evaluated: int = 0
    accepted: int = 0
    tokens: int = 0
    runs: int = 0

    def __add__(self, other: Guesses) -> Guesses:
        return Guesses(
            self.evaluated + other.evaluated,
            self.accepted + other.accepted,
            self.tokens + other.tokens,
            self.runs + other.runs,
        )

    def described(self, method: str) -> Speculated:
        """As the report has them; nothing guessed is nothing accepted."""
        rate = self.accepted / self.evaluated if self.evaluated else 0.0
        return Speculated(method, rate, self.tokens / self.runs if self.runs else 1.0)


def can_speculate(og: Any) -> bool:
    """Whether this release of onnxruntime-genai guesses tokens: 0.16 and later do."""
    return hasattr(og.GeneratorParams, "set_speculative_options")


def speculating_config(og: Any, folder: str, settings: Json) -> Any:
    """A bundle's configuration with the object of its `speculation.json` laid over it."""
    config = og.Config(folder)
    config.overlay(json.dumps(settings))
    return config


def guesses_of(generator: Any, tokens: int) -> Guesses:
    """What a generator that speculates has counted after so many new tokens."""
    counted = generator.get_speculative_stats()
    evaluated, accepted = (int(counted[f"draft_tokens_{what}"]) for what in ("evaluated", "accepted"))
    return Guesses(evaluated, accepted, tokens, sum(int(counted[kind]) for kind in _RUNS))
