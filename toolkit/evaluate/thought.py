"""A thought and an answer told apart in what a reasoning model writes, while it is still being written.

A thought stands between `<think>` and `</think>`. The templates of the R1 distills and of Qwen3-Thinking end the prompt
with `<think>`, so that the text begins inside a thought that it never opens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from toolkit.bundle.reasoning import BEGIN_OF_THOUGHT, END_OF_THOUGHT


@dataclass(frozen=True)
class ScoredToken:
    """A token's text and its log-probability in nats, and the likeliest of its place where those are asked for."""

    text: str
    logprob: float
    likeliest: tuple[ScoredToken, ...] = ()


class Piece(str):
    """Some text of an answer as it arrives: part of the thought, part of what follows it, or a marker between them.

    It is the text itself, so that the pieces of one answer, joined, are what the model wrote; `kind` is `thought`,
    `answer` or `marker`.
    """

    kind: str
    # Those that ended in this piece, where log-probabilities are asked for.
    tokens: tuple[ScoredToken, ...]

    def __new__(cls, kind: str, text: str, tokens: tuple[ScoredToken, ...] = ()) -> Piece:
        piece = super().__new__(cls, text)
        piece.kind, piece.tokens = kind, tokens
        return piece


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends inside a thought, so that what follows it begins in one."""
    _, begun, rest = prompt.rpartition(BEGIN_OF_THOUGHT)
    return bool(begun) and END_OF_THOUGHT not in rest


def after_thought(prompt: str, made: str) -> str | None:
    """What follows the thought in a finished text; None where a thought that prompt or text begins never ends.

    Text without any thought is an answer as a whole.
    """
    thought, end, text = made.partition(END_OF_THOUGHT)
    if end:
        return text
    return None if BEGIN_OF_THOUGHT in thought or opens_thought(prompt) else made


class ThoughtSplitter:
    """Sorts text that arrives in bits of any length into pieces; a marker may be cut over several bits.

    There is one thought at most: what follows `</think>` is the answer to its end. Without `splits` all of it is one
    answer.
    """

    def __init__(self, prompt: str, splits: bool = True) -> None:
        self._in_thought = splits and opens_thought(prompt)
        self._is_over = not splits
        self._held = ""

    def add(self, text: str) -> Iterator[Piece]:
        """The pieces that are certain once `text` has arrived; what may be the beginning of a marker is held back."""
        self._held += text
        while not self._is_over:
            before, marker, after = self._held.partition(self._awaited())
            if not marker:
                break
            yield from self._piece(before)
            yield Piece("marker", marker)
            self._is_over, self._in_thought, self._held = self._in_thought, not self._in_thought, after
        kept = 0 if self._is_over else overlap(self._held, self._awaited())
        certain, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        yield from self._piece(certain)

    def end(self) -> Iterator[Piece]:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        yield from self._piece(held)

    def _awaited(self) -> str:
        return END_OF_THOUGHT if self._in_thought else BEGIN_OF_THOUGHT

    def _piece(self, text: str) -> Iterator[Piece]:
        if text:
            yield Piece("thought" if self._in_thought else "answer", text)


def overlap(text: str, marker: str) -> int:
    """How many characters at the end of `text` are the beginning of `marker`."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)
