"""Tools that a model may call: how they are asked for, and calls found in what it writes.

A call is written as Hermes, Qwen and their kin do: `<tool_call>`, an object of `name` and `arguments`, `</tool_call>`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from toolkit.evaluate.grammar import json_rule, literal
from toolkit.evaluate.thought import overlap
from toolkit.serve.refusal import Refusal
from toolkit.typed_json import Json

BEGIN_OF_CALL: Final = "<tool_call>"
END_OF_CALL: Final = "</tool_call>"


@dataclass(frozen=True)
class Tools:
    """The tools of a request as the template takes them, and the rule of an answer where one has to be called."""

    described: Sequence[Mapping[str, Json]]
    grammar: str | None


@dataclass(frozen=True)
class ToolCall:
    """A call that the model has written: `arguments` is JSON."""

    id: str
    name: str
    arguments: str

    def body(self) -> dict[str, Json]:
        """Returns the call as chat completions have it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


def tools_of(raw: Mapping[str, Json]) -> Tools | None:
    """The tools of a chat request, None where it has none or wants none called."""
    given, choice = raw.get("tools"), raw.get("tool_choice", "auto")
    if not given or choice == "none":
        return None
    if not isinstance(given, list) or not all(_is_function(tool) for tool in given):
        raise Refusal("tools is no array of functions with names", param="tools")
    if choice == "auto":
        return Tools(given, None)
    wanted = [tool["function"] for tool in given]
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        wanted = [tool for tool in wanted if tool["name"] == name]
    elif choice != "required":
        wanted = []
    if not wanted:
        raise Refusal("tool_choice is no none, auto or required, and names no tool", param="tool_choice")
    rule = json_rule({"anyOf": [_schema(tool) for tool in wanted]})
    return Tools(given, f"{literal(BEGIN_OF_CALL)} {rule} {literal(END_OF_CALL)}")


def _is_function(tool: Json) -> bool:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("parameters", {}), dict)
    )


def _schema(tool: Mapping[str, Json]) -> Json:
    parameters = tool.get("parameters") or {"type": "object"}
    properties = {"name": {"const": tool["name"]}, "arguments": parameters}
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


class CallFinder:
    """Tells calls from the text around them, while both arrive in bits."""

    def __init__(self) -> None:
        self._held = ""
        self.calls: list[ToolCall] = []

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """The text that is certain to be in no call, and the calls that are whole."""
        self._held += text
        before, begin, rest = self._held.partition(BEGIN_OF_CALL)
        if not begin:
            kept = overlap(before, BEGIN_OF_CALL)
            certain, self._held = before[: len(before) - kept], before[len(before) - kept :]
            return certain, []
        written, end, after = rest.partition(END_OF_CALL)
        if not end:
            self._held = begin + rest
            return before, []
        self._held = ""
        call = _read_call(written)
        found = [call] if call else []
        self.calls += found
        more, others = self.add(after)
        text = "" if call else begin + written + end
        return before + text + more, found + others

    def end(self) -> str:
        """What was held back, once no more text will come: a call that was never finished is text."""
        held, self._held = self._held, ""
        return held


def _read_call(text: str) -> ToolCall | None:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        return None
    arguments = json.dumps(raw.get("arguments", {}), ensure_ascii=False)
    return ToolCall(f"call_{secrets.token_hex(12)}", raw["name"], arguments)
