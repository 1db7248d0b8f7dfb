"""Questions and answers through onnxruntime-genai, with the bundle's chat template."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from toolkit import names
from toolkit.errors import BundleError
from toolkit.evaluate.session import OpenModel, open_model
from toolkit.evaluate.thought import Piece, ThoughtSplitter


class ChatTemplate:
    """A bundle's chat template, as onnxruntime-genai renders it, and the tokenizer that it comes with.

    Raises BundleError for a tokenizer that onnxruntime-genai cannot read.
    """

    def __init__(self, bundle: Path, opened: OpenModel) -> None:
        self._bundle = bundle
        try:
            self.tokenizer = opened.og.Tokenizer(opened.model)
        except Exception as problem:  # whatever the runtime throws
            raise BundleError(f"onnxruntime-genai cannot read {names.TOKENIZER_FILE} of {bundle}: {problem}") from None

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages of `role` and `content` as one prompt. Raises BundleError where there is no template for them."""
        text = json.dumps(messages, ensure_ascii=False)
        try:
            return str(self.tokenizer.apply_chat_template(text, add_generation_prompt=add_generation_prompt))
        except Exception as problem:  # whatever the runtime throws
            reason = str(problem).splitlines()[0][:200]
            raise BundleError(f"onnxruntime-genai cannot apply the chat template of {self._bundle}: {reason}") from None


@dataclass(frozen=True)
class Answer:
    """One turn: the thought and the answer apart, and how it ended.

    `finish_reason` is `stop` where the model ended it, `length` where `max_new_tokens` or the context did. `new_tokens`
    counts thought, markers and the stop token. `ttft_s` is the time to the first token, `decode_tokens_per_s` the speed
    of those after it, None where there is no second.
    """

    thought: str
    text: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    decode_tokens_per_s: float | None


class Conversation:
    """Questions and answers in turn. Every turn begins with a fresh generator over the whole conversation, which is
    right on every kind of bundle, and earlier thoughts are left out, as reasoning models are trained.

    Raises BundleError for a bundle without a tokenizer.
    """

    def __init__(self, bundle: Path, max_new_tokens: int, on_cpu: bool = False) -> None:
        if not (bundle / names.TOKENIZER_FILE).is_file():
            raise BundleError(f"{bundle} has no {names.TOKENIZER_FILE}: a synthetic bundle has no words, only speed")
        self._opened = open_model(bundle, on_cpu)
        self._template = ChatTemplate(bundle, self._opened)
        self._tokenizer = self._template.tokenizer
        self._max_new_tokens = max_new_tokens
        self._messages: list[dict[str, str]] = []
        self._answer: Answer | None = None

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
        prompt = self._template.render(messages)
        ids = self._tokenizer.encode(prompt)
        settings, stop_ids = self._opened.settings, frozenset(self._opened.settings.eos_token_ids)
        if settings.room_after(len(ids), 1) < 1:
            raise BundleError(
                f"the conversation has {len(ids)} tokens, the bundle's context {settings.context_length}: start anew"
            )
        begun = time.perf_counter()
        splitter, stream = ThoughtSplitter(prompt), self._tokenizer.create_stream()
        texts = {"thought": "", "answer": ""}
        first = last = begun
        made: list[int] = []
        for token in self._opened.stream(ids, self._max_new_tokens):
            made.append(token)
            last = time.perf_counter()
            first = last if len(made) == 1 else first
            for piece in splitter.add("" if token in stop_ids else stream.decode(token)):
                texts[piece.kind] = texts.get(piece.kind, "") + piece
                yield piece
        for piece in splitter.end():
            texts[piece.kind] += piece
            yield piece
        stopped = bool(made) and made[-1] in stop_ids
        self._answer = Answer(
            thought=texts["thought"].strip(),
            text=texts["answer"].strip(),
            finish_reason="stop" if stopped else "length",
            prompt_tokens=len(ids),
            new_tokens=len(made),
            ttft_s=first - begun,
            decode_tokens_per_s=(len(made) - 1) / (last - first) if last > first else None,
        )
        if stopped:
            self._messages = [*messages, {"role": "assistant", "content": self._answer.text}]
