"""Tokens that are guessed ahead and checked several in a run, as onnxruntime-genai counts them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from toolkit.report.sections import Speculated
from toolkit.speculation import MTP
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


class MtpText:
    """A text that an MTP head guesses for: onnxruntime-genai's MtpGenerator, of a model and its head, with the methods
    of its Generator as far as a text needs them. It holds to no grammar, and tells no logits."""

    def __init__(self, og: Any, model: Any, head: Any, params: Any) -> None:
        self._generator = og.MtpGenerator(model, head, params)

    def append_tokens(self, tokens: Sequence[int]) -> None:
        """Reads the prompt, which it does once alone."""
        self._generator.append_tokens(np.asarray(tokens, np.int32))

    def is_done(self) -> bool:
        """Returns whether the text has ended."""
        return bool(self._generator.is_done())

    def generate_next_token(self) -> None:
        """Writes one token more of the text."""
        self._generator.generate_next_token()

    def get_next_tokens(self) -> Any:
        """Returns the last token that was written, as an array of one."""
        return self._generator.get_sequence()[-1:]

    def get_sequence(self, index: int) -> Any:
        """Returns the prompt and what was written; `index` is 0, for there is one text."""
        assert index == 0, "an MTP head guesses for one text at a time"
        return self._generator.get_sequence()

    def get_speculative_stats(self) -> Any:
        """Returns what onnxruntime-genai has counted itself."""
        return self._generator.get_stats()


def can_speculate(og: Any, word: str | None = None) -> bool:
    """Whether this release of onnxruntime-genai guesses tokens, 0.16 and later do, or does by an MTP head if that is
    the `word`."""
    able = hasattr(og.GeneratorParams, "set_speculative_options")
    return able and (word != MTP or hasattr(og, "MtpGenerator"))


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
