"""Log-likelihoods of text, as lm-evaluation-harness defines them: where tokens are parted, what is fed, what counts.

T tokens, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import RecipeError

Logits = Callable[[list[int]], NDArray[np.float32]]


class Encode(Protocol):
    """Text to ids; the tokenizer's own BOS comes first where `special`."""

    def __call__(self, text: str, special: bool = True) -> list[int]: ...


class Likelihood:
    """Log-likelihoods by a model that gives logits [T, V] after each of T ids, at most `length` of them at once.

    Text without anything before it follows `prefix_id`, the BOS token or else the EOS token.
    """

    def __init__(self, logits: Logits, encode: Encode, prefix_id: int, length: int) -> None:
        self._logits, self._encode = logits, encode
        self._prefix_id, self._length = prefix_id, length
        self._last: tuple[list[int], NDArray[np.float32]] | None = None

    def of_continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        """Returns (log-likelihood in nats, whether greedy decoding would say it) of a continuation after a context.

        A context that is too long loses its beginning. Raises RecipeError for a continuation longer than `length`.
        """
        before, targets = self.parted(context, continuation)
        if len(targets) > self._length:
            raise RecipeError(
                f"a continuation of {len(targets)} tokens is longer than the bundle's context of {self._length}"
            )
        return self._scored([*before, *targets][:-1][-self._length :], targets)

    def of_text(self, text: str) -> float:
        """Returns the log-likelihood in nats of a whole text, each token once, in windows with all the context they
        hold."""
        ids = self._encode(text, special=False)
        return sum(self._scored(fed, targets)[0] for fed, targets in self.windows(ids))

    def parted(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of the context, never none, and of the continuation.

        Spaces at the context's end belong to the continuation's first word. Both are encoded as one text, and the
        continuation is what comes after as many ids as the context has alone.
        """
        words = context.rstrip()
        continuation = context[len(words) :] + continuation
        before = self._encode(words) if words else []
        after = self._encode(words + continuation)[len(before) :] if before else []
        # With nothing before it, or swallowed by the last token of the context.
        return before or [self._prefix_id], after or self._encode(continuation, special=False)

    def windows(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Returns (what is fed, the last ids it predicts), each of `ids` predicted once; the last window is a full one
        too."""
        before = [self._prefix_id, *ids]
        for start in range(0, len(ids), self._length):
            stop = min(start + self._length, len(ids))
            yield before[max(stop - self._length, 0) : stop], ids[start:stop]

    def _scored(self, fed: list[int], targets: list[int]) -> tuple[float, bool]:
        if not targets:
            return 0.0, True
        # The choices of a question often differ in their last token alone.
        if self._last is None or self._last[0] != fed:
            self._last = fed, self._logits(fed)
        rows = self._last[1][-len(targets) :].astype(np.float64)
        rows -= rows.max(axis=-1, keepdims=True)
        chosen = rows[np.arange(len(targets)), targets]
        total = float((chosen - np.log(np.exp(rows).sum(axis=-1))).sum())
        return total, bool((rows.argmax(axis=-1) == targets).all())
