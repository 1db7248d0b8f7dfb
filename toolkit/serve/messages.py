"""Messages of OpenAI's API as chat templates take them."""

from __future__ import annotations

import json
from typing import Final

from toolkit.serve.refusal import Refusal
from toolkit.typed_json import Json

_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_TEXTS: Final = ("text", "input_text", "output_text")


def chat_messages(given: Json, param: str = "messages") -> list[dict[str, Json]]:
    """The messages of a request. Raises Refusal for what is no list of them, or holds more than text."""
    if not isinstance(given, list) or not given:
        raise Refusal(f"{param} is missing or empty, expected an array of messages", param=param)
    return [_message(entry, f"{param}[{k}]") for k, entry in enumerate(given) if not _is_thought(entry)]


def text_of(content: Json, where: str) -> str:
    """The text of a message's content: one string, or parts of text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refusal(f"{where} is {type(content).__name__}, expected text", param=where)
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in _TEXTS or not isinstance(part.get("text"), str):
            raise Refusal(f"{where} has a part that is no text: these models read text alone", param=where)
        texts.append(str(part["text"]))
    return "".join(texts)


def _is_thought(entry: Json) -> bool:
    """Items of /v1/responses that hold earlier thoughts, which never enter a prompt."""
    return isinstance(entry, dict) and entry.get("type") == "reasoning"


def _message(entry: Json, where: str) -> dict[str, Json]:
    if not isinstance(entry, dict) or entry.get("role") not in _ROLES:
        raise Refusal(f"{where} has no role of {', '.join(_ROLES)}", param=where)
    message: dict[str, Json] = {
        "role": _ROLES[entry["role"]],
        "content": text_of(entry.get("content"), f"{where}.content"),
    }
    for key in ("name", "tool_call_id"):
        if isinstance(entry.get(key), str):
            message[key] = entry[key]
    calls = entry.get("tool_calls")
    if isinstance(calls, list) and calls:
        message["tool_calls"] = [_call(call, where) for call in calls]
    return message


def _call(call: Json, where: str) -> Json:
    """An earlier tool call, its arguments an object, as templates write them."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refusal(f"{where}.tool_calls has no function with a name", param=where)
    arguments = function.get("arguments", "{}")
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        raise Refusal(f"{where}.tool_calls has arguments that are not JSON", param=where) from None
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
