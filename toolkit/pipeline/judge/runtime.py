"""The bundle through onnxruntime-genai, as an app has it: what it makes of the text's first words, and how fast.

T positions, V vocab.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from toolkit.bundle.settings import read_settings
from toolkit.evaluate.parity import matching_prefix
from toolkit.evaluate.session import continuations
from toolkit.evaluate.speed import continue_and_measure
from toolkit.pipeline.judge.subject import GREEDY_PROMPT, Subject
from toolkit.reference.decoder import Array
from toolkit.report.sections import NotMeasured, Speed

_GREEDY_NEW: Final = 32
# Tokens of a prompt, tokens after it, and runs.
_BENCH: Final = (128, 64, 3)


@dataclass(frozen=True)
class Greedy:
    """A prompt, and what a bundle makes of it greedily, as token ids."""

    prompt: list[int]
    made: list[int]

    def matching(self, logits: Array) -> int:
        """How many of its first tokens are the best of the checkpoint's logits [T, V] on prompt and tokens."""
        best = logits[len(self.prompt) - 1 : -1].argmax(axis=-1)
        return matching_prefix(best.tolist(), self.made)


def through_genai(subject: Subject) -> tuple[Greedy, Speed | NotMeasured]:
    """The first words of the text as the bundle continues them, and the medians of a few runs, or why there are none.

    Where the speed is measured, both come from one process, which loads the model once.
    """
    prompt = subject.sequences[0][:GREEDY_PROMPT]
    if not subject.effort.speed:
        return _continued(subject, prompt), NotMeasured("speed", "left out by --no-speed")
    if not subject.here:
        reason = "the execution provider of the bundle is not on this machine: `toolkit bench --on-cpu`"
        return _continued(subject, prompt), NotMeasured("speed", reason)
    subject.progress("greedy tokens and speed through onnxruntime-genai")
    asked, new, repeat = _BENCH
    room = read_settings(subject.bundle).context_length
    if asked + new > room:
        asked, new = room // 2, room - room // 2
    found = continue_and_measure(subject.bundle, prompt, _GREEDY_NEW, asked, new, repeat)
    return Greedy(prompt, list(found.made)), found.speed


def _continued(subject: Subject, prompt: list[int]) -> Greedy:
    subject.progress("greedy tokens through onnxruntime-genai")
    (made,) = continuations(subject.bundle, [prompt], _GREEDY_NEW, not subject.here)
    return Greedy(prompt, made)
