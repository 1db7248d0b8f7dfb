"""Answers as OpenAI's /v1/responses tells them: a thought item and a message item, whole or as events."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import AsyncIterator, Iterator

from toolkit.evaluate.text_model import Written
from toolkit.serve.asked import AskedText
from toolkit.serve.replies import Delta, Object, Whole


class ResponseReply:
    """Tells an answer as /v1/responses does."""

    def __init__(self, asked: AskedText) -> None:
        self._asked = asked
        self._numbers = itertools.count()
        self._id, self._created = f"resp_{secrets.token_hex(12)}", int(time.time())

    def whole(self, made: Whole) -> Object:
        """Returns the answer in one object."""
        thought = [_Item("reasoning", made.thought).whole()] if made.thought else []
        return self._response([*thought, _Item("message", made.text).whole()], made.written)

    async def chunks(self, parts: AsyncIterator[Delta]) -> AsyncIterator[Object]:
        """Yields the answer in events as it comes."""
        for kind in ("response.created", "response.in_progress"):
            yield self._numbered({"type": kind, "response": self._response([], None)})
        items: list[_Item] = []
        async for part in parts:
            if part.written is not None:
                for item in items[-1:] or [_Item("message")]:
                    for event in item.end(len(items[:-1])):
                        yield self._numbered(event)
                output = [item.whole() for item in items or [_Item("message")]]
                kind = "completed" if part.written.finish_reason == "stop" else "incomplete"
                yield self._numbered({"type": f"response.{kind}", "response": self._response(output, part.written)})
                return
            kind, text = ("reasoning", part.thought) if part.thought else ("message", part.text)
            if not text:
                continue
            if not items or items[-1].kind != kind:
                for event in items[-1].end(len(items) - 1) if items else ():
                    yield self._numbered(event)
                items.append(_Item(kind))
                for event in items[-1].begin(len(items) - 1):
                    yield self._numbered(event)
            yield self._numbered(items[-1].add(text, len(items) - 1))

    def _numbered(self, event: Object) -> Object:
        return {**event, "sequence_number": next(self._numbers)}

    def _response(self, output: list[Object], written: Written | None) -> Object:
        is_cut = written is not None and written.finish_reason == "length"
        status = "in_progress" if written is None else "incomplete" if is_cut else "completed"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._asked.model,
            "output": output,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "temperature": self._asked.options.search.temperature,
            "top_p": self._asked.options.search.top_p,
            "usage": None if written is None else _usage(written),
        }


class _Item:
    """One item of the output while it is written: a thought (`reasoning`) or a `message`."""

    def __init__(self, kind: str, text: str = "") -> None:
        self.kind, self._text = kind, text
        self._id = f"{'rs' if kind == 'reasoning' else 'msg'}_{secrets.token_hex(12)}"
        self._type = "reasoning_text" if kind == "reasoning" else "output_text"

    def whole(self, status: str = "completed") -> Object:
        """Returns the item as it stands."""
        content = [self._part()] if status == "completed" else []
        item: Object = {"type": self.kind, "id": self._id, "status": status, "content": content}
        return {**item, **({"summary": []} if self.kind == "reasoning" else {"role": "assistant"})}

    def begin(self, index: int) -> Iterator[Object]:
        """Yields the events that come before its text."""
        yield {"type": "response.output_item.added", "output_index": index, "item": self.whole("in_progress")}
        yield {"type": "response.content_part.added", **self._place(index), "part": _Item(self.kind)._part()}

    def add(self, text: str, index: int) -> Object:
        """The event of some more text."""
        self._text += text
        return {"type": f"response.{self._type}.delta", **self._place(index), "delta": text, **self._scores()}

    def end(self, index: int) -> Iterator[Object]:
        """Yields the events that come after its text."""
        yield {"type": f"response.{self._type}.done", **self._place(index), "text": self._text, **self._scores()}
        yield {"type": "response.content_part.done", **self._place(index), "part": self._part()}
        yield {"type": "response.output_item.done", "output_index": index, "item": self.whole()}

    def _part(self) -> Object:
        part: Object = {"type": self._type, "text": self._text}
        return {**part, "annotations": [], **self._scores()} if self.kind == "message" else part

    def _scores(self) -> Object:
        return {"logprobs": []} if self.kind == "message" else {}

    def _place(self, index: int) -> Object:
        return {"item_id": self._id, "output_index": index, "content_index": 0}


def _usage(written: Written) -> Object:
    return {
        "input_tokens": written.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": written.new_tokens,
        "output_tokens_details": {"reasoning_tokens": written.thought_tokens},
        "total_tokens": written.prompt_tokens + written.new_tokens,
    }
