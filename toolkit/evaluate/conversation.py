"""Questions and answers through onnxruntime-genai, with the bundle's chat template."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from toolkit.evaluate.text_model import TextModel, TextOptions, Written
from toolkit.evaluate.thought import Piece
from toolkit.report.sections import Speculated


@dataclass(frozen=True)
class Answer:
    """One turn: the thought and the answer apart, and how it ended.

    `finish_reason` is `stop` where the model ended it, `length` where `max_new_tokens` or the context did. `new_tokens`
    counts thought, markers and the stop token. `ttft_s` is the time to the first token, `decode_tokens_per_s` the speed
    of those after it, None where there is no second. `speculation` is what came of guessing tokens ahead, None where
    nothing guesses.
    """

    thought: str
    text: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    decode_tokens_per_s: float | None
    speculation: Speculated | None = None


class Conversation:
    """Questions and answers in turn. Every turn begins with a fresh generator over the whole conversation, which is
    right on every kind of bundle, and earlier thoughts are left out, as reasoning models are trained.

    Raises BundleError for a bundle without a tokenizer.
    """

    def __init__(self, bundle: Path, max_new_tokens: int, on_cpu: bool = False) -> None:
        self._model = TextModel(bundle, on_cpu)
        self._options = TextOptions(max_new_tokens)
        self._messages: list[dict[str, str]] = []
        self._answer: Answer | None = None

    @property
    def max_new_tokens(self) -> int:
        """How many tokens an answer may have."""
        return self._options.max_new_tokens or self.context_length

    @property
    def context_length(self) -> int:
        """How many tokens a prompt and its answer have together at most."""
        return self._model.settings.context_length

    @property
    def answer(self) -> Answer:
        """The last answer, once its last piece was taken from `ask`."""
        if self._answer is None:
            raise RuntimeError("no answer is finished: take every piece that `ask` yields first")
        return self._answer

    def ask(self, question: str) -> Iterator[Piece]:
        """Pieces of the answer as they come; afterwards `answer` holds it whole.

        An answer that the limit cut is no answer: neither it nor its question stays in the conversation. Raises
        BundleError if the conversation has outgrown the context.
        """
        self._answer = None
        messages = [*self._messages, {"role": "user", "content": question}]
        texts = {"thought": "", "answer": "", "marker": ""}
        pieces = self._model.pieces(self._model.template.render(messages), self._options)
        written = yield from _kept(pieces, texts)
        self._answer = Answer(
            thought=texts["thought"].strip(),
            text=texts["answer"].strip(),
            finish_reason=written.finish_reason,
            prompt_tokens=written.prompt_tokens,
            new_tokens=written.new_tokens,
            ttft_s=written.ttft_s,
            decode_tokens_per_s=(written.new_tokens - 1) / written.decode_s if written.decode_s > 0 else None,
            speculation=written.speculation,
        )
        if written.ended_itself:
            self._messages = [*messages, {"role": "assistant", "content": self._answer.text}]


def _kept(pieces: Generator[Piece, None, Written], texts: dict[str, str]) -> Generator[Piece, None, Written]:
    """The same pieces, each added to the text of its kind."""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            return cast(Written, end.value)
        texts[piece.kind] += piece
        yield piece
