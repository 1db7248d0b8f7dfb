"""Answers as OpenAI's /v1/chat/completions and /v1/completions tell them, whole or piece by piece."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from toolkit.evaluate.text_model import Written
from toolkit.evaluate.thought import ScoredToken
from toolkit.serve.asked import AskedText
from toolkit.serve.job import FAILED, REFUSED, WRITTEN, Event
from toolkit.serve.refusal import Refusal
from toolkit.serve.tools import CallFinder, ToolCall
from toolkit.typed_json import Json

Object = dict[str, Json]
Events = AsyncIterator[Event]


@dataclass
class Whole:
    """An answer as far as it has come."""

    thought: str = ""
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    tokens: list[ScoredToken] = field(default_factory=list)
    thought_tokens: list[ScoredToken] = field(default_factory=list)
    written: Written | None = None

    @property
    def finish_reason(self) -> str:
        """Returns how it ended, as chat completions say."""
        assert self.written is not None
        return "tool_calls" if self.calls else self.written.finish_reason


@dataclass(frozen=True)
class Delta:
    """What one event adds to an answer; the last has only `written`."""

    thought: str = ""
    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    tokens: tuple[ScoredToken, ...] = ()
    thought_tokens: tuple[ScoredToken, ...] = ()
    written: Written | None = None


def check_event(event: Event) -> Event:
    """The event; raises Refusal for one that says why there is no answer."""
    if event.kind == REFUSED:
        raise Refusal(event.text)
    if event.kind == FAILED:
        raise Refusal(event.text, status=503)
    return event


async def deltas(asked: AskedText, events: Events) -> AsyncIterator[Delta]:
    """What each event adds. Raises Refusal where there is no answer."""
    finder = CallFinder() if asked.tools else None
    async for event in events:
        check_event(event)
        if event.kind == "thought":
            yield Delta(thought=event.text, thought_tokens=event.tokens)
        elif event.kind == "answer":
            text, calls = finder.add(event.text) if finder else (event.text, [])
            yield Delta(text=text, calls=tuple(calls), tokens=event.tokens)
        elif event.kind == WRITTEN:
            if finder and (held := finder.end()):
                yield Delta(text=held)
            yield Delta(written=event.written)


async def whole(asked: AskedText, events: Events) -> Whole:
    """The answer once it has ended. Raises Refusal where there is none."""
    made = Whole()
    async for delta in deltas(asked, events):
        made.thought += delta.thought
        made.text += delta.text
        made.calls += delta.calls
        made.tokens += delta.tokens
        made.thought_tokens += delta.thought_tokens
        made.written = delta.written
    return made


def usage(written: Written) -> Object:
    """Tokens as chat completions count them."""
    return {
        "prompt_tokens": written.prompt_tokens,
        "completion_tokens": written.new_tokens,
        "total_tokens": written.prompt_tokens + written.new_tokens,
        "completion_tokens_details": {"reasoning_tokens": written.thought_tokens},
    }


def timings(written: Written) -> Object:
    """Times and speed under llama-server's names."""
    decoded = written.new_tokens - 1
    return {
        "prompt_n": written.prompt_tokens,
        "prompt_ms": 1000 * written.ttft_s,
        "predicted_n": written.new_tokens,
        "predicted_ms": 1000 * written.decode_s,
        "predicted_per_second": decoded / written.decode_s if written.decode_s > 0 else None,
    }


class ChatReply:
    """Tells an answer as /v1/chat/completions does, the thought as `reasoning_content`."""

    def __init__(self, asked: AskedText) -> None:
        self._asked = asked
        self._head: Object = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time())}

    def whole(self, made: Whole) -> Object:
        """Returns the answer in one object."""
        assert made.written is not None
        message: Object = {"role": "assistant", "content": made.text or (None if made.calls else "")}
        if made.thought:
            message["reasoning_content"] = made.thought
        if made.calls:
            message["tool_calls"] = [call.body() for call in made.calls]
        choice: Object = {"index": 0, "message": message, "finish_reason": made.finish_reason}
        if self._asked.options.alternatives is not None:
            choice["logprobs"] = _logprobs(made.tokens, made.thought_tokens)
        figures = {"usage": usage(made.written), "timings": timings(made.written)}
        return {**self._head, "object": "chat.completion", "model": self._asked.model, "choices": [choice], **figures}

    async def chunks(self, parts: AsyncIterator[Delta]) -> AsyncIterator[Object]:
        """Yields the answer in chunks as it comes."""
        yield self._chunk({"role": "assistant", "content": ""})
        called = 0
        async for part in parts:
            if part.written is not None:
                reason = "tool_calls" if called else part.written.finish_reason
                yield {**self._chunk({}, reason), "timings": timings(part.written)}
                if self._asked.include_usage:
                    yield {**self._chunk({}), "choices": [], "usage": usage(part.written)}
                return
            delta: Object = {}
            if part.thought:
                delta["reasoning_content"] = part.thought
            if part.text:
                delta["content"] = part.text
            if part.calls:
                delta["tool_calls"] = [{"index": called + k, **call.body()} for k, call in enumerate(part.calls)]
                called += len(part.calls)
            if delta or part.tokens or part.thought_tokens:
                yield self._chunk(delta, None, part.tokens, part.thought_tokens)

    def _chunk(
        self,
        delta: Object,
        finish_reason: str | None = None,
        tokens: Sequence[ScoredToken] = (),
        thought_tokens: Sequence[ScoredToken] = (),
    ) -> Object:
        choice: Object = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        if self._asked.options.alternatives is not None:
            choice["logprobs"] = _logprobs(tokens, thought_tokens)
        return {**self._head, "object": "chat.completion.chunk", "model": self._asked.model, "choices": [choice]}


class CompletionReply:
    """Tells an answer as /v1/completions does, thought and markers in its text."""

    def __init__(self, asked: AskedText) -> None:
        self._asked = asked
        self._head: Object = {"id": f"cmpl-{secrets.token_hex(12)}", "created": int(time.time())}

    def whole(self, made: Whole) -> Object:
        """Returns the answer in one object."""
        assert made.written is not None
        echoed = (self._asked.prompt or "") if self._asked.echo else ""
        body = self._body(echoed + made.text, made.written.finish_reason, made.tokens)
        return {**body, "usage": usage(made.written), "timings": timings(made.written)}

    async def chunks(self, parts: AsyncIterator[Delta]) -> AsyncIterator[Object]:
        """Yields the answer in chunks as it comes."""
        if self._asked.echo:
            yield self._body(self._asked.prompt or "", None, ())
        async for part in parts:
            if part.written is not None:
                yield {**self._body("", part.written.finish_reason, ()), "timings": timings(part.written)}
                if self._asked.include_usage:
                    yield {**self._body("", None, ()), "choices": [], "usage": usage(part.written)}
            else:
                yield self._body(part.text, None, part.tokens)

    def _body(self, text: str, finish_reason: str | None, tokens: Sequence[ScoredToken]) -> Object:
        choice: Object = {"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": None}
        if self._asked.options.alternatives is not None:
            choice["logprobs"] = {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [{one.text: one.logprob for one in token.likeliest} for token in tokens],
            }
        return {**self._head, "object": "text_completion", "model": self._asked.model, "choices": [choice]}


def _logprobs(tokens: Sequence[ScoredToken], thought_tokens: Sequence[ScoredToken]) -> Object:
    """Log-probabilities of the answer's tokens, and of the thought's beside them."""
    return {
        "content": [_scored(token) for token in tokens],
        "reasoning_content": [_scored(token) for token in thought_tokens],
        "refusal": None,
    }


def _scored(token: ScoredToken) -> Object:
    spelt: Object = {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode())}
    return (
        {**spelt, "top_logprobs": [_scored(one) for one in token.likeliest]}
        if token.likeliest
        else {**spelt, "top_logprobs": []}
    )
