"""What the checkpoint, and plain rounding of it, make of every sequence that is judged: one pass for all of them.

T positions, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from toolkit.evaluate.rounded import plain_rounding
from toolkit.machine import free_memory_bytes
from toolkit.pipeline.judge.subject import Subject
from toolkit.reference.beside import Forward, exact, hidden_beside, logits_beside
from toolkit.reference.decoder import Array

# The part of the free memory that the logits of one group of sequences may take; the first group's are kept.
_SHARE: Final = 8


class Reference:
    """Logits of the subject's text, and of some sequences `beside` it, such as greedy continuations.

    Hidden states of all of them come from one pass over the layers. Logits come for as many sequences at a time as
    `logits_bytes` hold, which at the default lengths is all of them, so that the head is read and widened once too.
    """

    words: Final = "numpy float32 forward of the checkpoint"

    def __init__(self, subject: Subject, beside: Sequence[list[int]], logits_bytes: int | None = None) -> None:
        self._config, self._source, self._fitting = subject.checkpoint.config, subject.source, subject.fitting
        self.variants = [exact, plain_rounding] if subject.wants_baseline else [exact]
        runs = [Forward(variant, subject.sequences) for variant in self.variants]
        runs[0] = Forward(exact, [*beside, *subject.sequences])
        hidden = hidden_beside(self._config, self._source, runs, subject.progress, self._fitting)
        others, hidden[0] = hidden[0][: len(beside)], hidden[0][len(beside) :]
        self.hidden = hidden
        room = free_memory_bytes() // _SHARE if logits_bytes is None else logits_bytes
        self._groups = self._grouped(room // (4 * self._config.vocab_size * len(self.variants)))
        subject.progress("logits of the reference")
        # A pool's processes make those of the text for themselves.
        self._first: list[list[Array]] | None = None
        if self._fitting.pool:
            self.beside = self._alone(others)
            return
        self._first = self._logits(self._groups[0], others)
        self.beside = [logits.copy() for logits in self._first[0][: len(beside)]]
        self._first[0] = self._first[0][len(beside) :]

    def text(self) -> Iterator[tuple[Array, Array | None]]:
        """Logits [T, V] of each sequence of the text, and plain rounding's where these are wanted."""
        for k, group in enumerate(self._groups):
            made = self._logits(group, []) if k or self._first is None else self._first
            yield from zip(made[0], made[1] if len(made) > 1 else [None] * len(group), strict=True)

    def _alone(self, others: list[Array]) -> list[Array]:
        """The checkpoint's own logits of some sequences beside the text."""
        (made,) = logits_beside(self._config, self._source, [exact], [np.concatenate(others)], self._fitting)
        return np.split(made, np.cumsum([len(x) for x in others])[:-1])

    def _grouped(self, positions: int) -> list[range]:
        """The sequences in groups of at most so many positions, or of one sequence."""
        groups, start, held = [], 0, 0
        for k, states in enumerate(self.hidden[0]):
            if k > start and held + len(states) > positions:
                groups.append(range(start, k))
                start, held = k, 0
            held += len(states)
        return [*groups, range(start, len(self.hidden[0]))]

    def _logits(self, group: range, others: list[Array]) -> list[list[Array]]:
        """By variant the logits of each sequence of a group; the checkpoint's own of `others` stand before its."""
        states = [[run[k] for k in group] for run in self.hidden]
        states[0] = [*others, *states[0]]
        joined = [np.concatenate(some) for some in states]
        made = logits_beside(self._config, self._source, self.variants, joined, self._fitting)
        ends = [np.cumsum([len(x) for x in some])[:-1] for some in states]
        return [np.split(logits, end) for logits, end in zip(made, ends, strict=True)]
