"""Conversations that a chat template is tried on: turns, roles, tools, thoughts and awkward texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

Message = Mapping[str, Any]

_TOOLS: Final = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells today's weather in a city's streets.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where, 北京 for instance"},
                    "days": {"type": "integer", "enum": [1, 2, 3]},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "clock",
            "description": "Tells the time.",
            "parameters": {"type": "object", "properties": {}, "required": []},
        },
    },
)


@dataclass(frozen=True)
class Probe:
    """One conversation: its messages, the tools that are offered, and whether the answer is about to begin."""

    name: str
    messages: tuple[Message, ...]
    tools: tuple[Message, ...] = ()
    add_generation_prompt: bool = True


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str | None, **more: object) -> Message:
    return {"role": "assistant", "content": text, **more}


_SYSTEM: Final[Message] = {"role": "system", "content": "You are brief.\nAlways."}
_ONE: Final = (_user("How much is 2 + 2?"),)
_THOUGHT: Final = "<think>\nTwo and two.\n</think>\n\nIt is 4."
_CALL: Final[Message] = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京", "days": 2}}}
_EMPTY_CALL: Final[Message] = {"type": "function", "function": {"name": "clock", "arguments": {}}}
_RESULT: Final[Message] = {
    "role": "tool",
    "name": "weather",
    "content": '{"sky": "clear"}',
    "tool_call_id": "call12345",
}


def _after(said: Message, *more: Message) -> tuple[Message, ...]:
    return (*_ONE, said, _user("And 3 + 3?"), *more)


FINISHED: Final = Probe("two turns, finished", (*_ONE, _assistant("It is 4.")), add_generation_prompt=False)
PROBES: Final = (
    Probe("one turn", _ONE),
    Probe("one turn, no generation prompt", _ONE, add_generation_prompt=False),
    Probe("system prompt", (_SYSTEM, *_ONE)),
    Probe("two turns", _after(_assistant("It is 4."))),
    FINISHED,
    Probe("three turns", (_SYSTEM, *_after(_assistant("It is 4."), _assistant(" 6 "), _user("Sure?\n")))),
    Probe("an earlier thought", _after(_assistant(_THOUGHT))),
    Probe("a finished thought", (*_ONE, _assistant(_THOUGHT)), add_generation_prompt=False),
    Probe("two earlier thoughts", _after(_assistant(_THOUGHT), _assistant("Three.\n</think>\n6"), _user("Sure?"))),
    Probe("a thought apart", _after(_assistant("It is 4.", reasoning_content="Two and two."))),
    Probe("an empty thought", _after(_assistant("<think>\n\n</think>\n\nIt is 4.", reasoning_content=""))),
    Probe("marker in a question", (_user("What does </think> mean? And <think>?"),)),
    Probe("quotes and lines", (_user('Say "it\'s" and\n\n\ta \\n {{ x }} {% if %}\n'),)),
    Probe("scripts and signs", (_user("你好，世界 — ¿qué tal? 👩‍👩‍👧 \u00e9"), _assistant("嗯。"), _user(" … "))),
    Probe("empty texts", (_user(""), _assistant(""), _user("?"))),
    Probe("tools", _ONE, _TOOLS),
    Probe("tools and system prompt", (_SYSTEM, *_ONE), _TOOLS),
    Probe("a call", (*_ONE, _assistant("", tool_calls=[{**_CALL, "id": "call12345"}]), _RESULT), _TOOLS),
    Probe("a call without text", (*_ONE, _assistant(None, tool_calls=[{**_CALL, "id": "call12345"}]), _RESULT), _TOOLS),
    Probe(
        "two calls and a thought",
        (
            _SYSTEM,
            *_ONE,
            _assistant(_THOUGHT, tool_calls=[{**_CALL, "id": "call12345"}, {**_EMPTY_CALL, "id": "call12346"}]),
            _RESULT,
            {**_RESULT, "name": "clock", "content": "12:00", "tool_call_id": "call12346"},
            _assistant("Clear, at noon."),
            _user("Thanks."),
        ),
        _TOOLS,
    ),
)
