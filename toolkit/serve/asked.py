"""What a request asks for, read out of the bodies of OpenAI's API and held to what onnxruntime-genai can do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

from toolkit.evaluate.grammar import json_rule
from toolkit.evaluate.text_model import SearchOptions, TextOptions
from toolkit.serve.messages import chat_messages
from toolkit.serve.refusal import Refusal
from toolkit.serve.tools import Tools, tools_of
from toolkit.typed_json import Json, from_json

_MOST_STOPS: Final = 16
_MOST_ALTERNATIVES: Final = 20
_SEEDS: Final = 1 << 31
# What onnxruntime-genai has no option for, and what it is where it changes nothing.
_ABSENT: Final[dict[str, Json]] = {
    "n": 1,
    "best_of": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "suffix": "",
    "min_p": 0,
    "functions": [],
    "previous_response_id": "",
    "background": False,
}


@dataclass(frozen=True)
class Scalars:
    """The scalars that every kind of request may have."""

    model: str = ""
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None


@dataclass(frozen=True)
class AskedText:
    """A request read: the text to write, and how the answer is told."""

    model: str
    stream: bool
    options: TextOptions
    prompt: str | None = None
    messages: Sequence[Mapping[str, Json]] = ()
    tools: Tools | None = None
    include_usage: bool = False
    echo: bool = False


def check_absent(given: Mapping[str, Json]) -> None:
    """Raises Refusal where a request asks for what onnxruntime-genai has no option for."""
    for name, nothing in _ABSENT.items():
        if given.get(name, nothing) != nothing:
            raise Refusal(f"{name} is not supported here: leave it out", param=name)


def asked_chat(raw: Mapping[str, Json]) -> AskedText:
    """Reads the body of a request to /v1/chat/completions."""
    sampled, tools = _sampled(raw), tools_of(raw)
    grammar = _format(raw.get("response_format"), "json_schema")
    if tools and tools.grammar:
        if grammar:
            raise Refusal("response_format cannot be kept where a tool has to be called", param="response_format")
        grammar = tools.grammar
    alternatives = None
    if raw.get("logprobs", False):
        alternatives = _whole(raw, "top_logprobs", _MOST_ALTERNATIVES) or 0
    stream_options = raw.get("stream_options")
    return AskedText(
        model=sampled.model,
        stream=sampled.stream,
        options=_options(sampled, raw, grammar, alternatives),
        messages=chat_messages(raw.get("messages")),
        tools=tools,
        include_usage=isinstance(stream_options, dict) and stream_options.get("include_usage") is True,
    )


def asked_completion(raw: Mapping[str, Json]) -> AskedText:
    """A request to /v1/completions: text goes on as it stands, without a template, thought and markers in it."""
    sampled, prompt = _sampled(raw), raw.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise Refusal("prompt is missing, expected one text", param="prompt")
    alternatives = _whole(raw, "logprobs", _MOST_ALTERNATIVES)
    stream_options = raw.get("stream_options")
    return AskedText(
        model=sampled.model,
        stream=sampled.stream,
        options=_options(sampled, raw, None, alternatives, splits_thought=False),
        prompt=prompt,
        include_usage=isinstance(stream_options, dict) and stream_options.get("include_usage") is True,
        echo=raw.get("echo") is True,
    )


def asked_response(raw: Mapping[str, Json]) -> AskedText:
    """A request to /v1/responses: text in, text out."""
    sampled, given = _sampled(raw), raw.get("input")
    if raw.get("tools"):
        raise Refusal("tools are supported by /v1/chat/completions alone", param="tools")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    instructions = raw.get("instructions")
    if isinstance(messages, list) and isinstance(instructions, str):
        messages = [{"role": "system", "content": instructions}, *messages]
    text = raw.get("text")
    grammar = _format(text.get("format"), None) if isinstance(text, dict) else None
    read = chat_messages(messages, param="input")
    return AskedText(sampled.model, sampled.stream, _options(sampled, raw, grammar, None), messages=read)


def _sampled(raw: Mapping[str, Json]) -> Scalars:
    try:
        sampled = from_json(Scalars, raw, "the request")
    except ValueError as problem:
        raise Refusal(str(problem)) from None
    for name, least, most in (
        ("temperature", 0, 2),
        ("top_p", 0, 1),
        ("top_k", 0, 1 << 20),
        ("repetition_penalty", 0.01, 10),
        ("max_tokens", 1, 1 << 30),
        ("max_completion_tokens", 1, 1 << 30),
        ("max_output_tokens", 1, 1 << 30),
    ):
        value = getattr(sampled, name)
        if value is not None and not (math.isfinite(value) and least <= value <= most):
            raise Refusal(f"{name} is {value!r:.20}, expected {least} to {most}", param=name)
    return sampled


def _options(
    sampled: Scalars,
    raw: Mapping[str, Json],
    grammar: str | None,
    alternatives: int | None,
    splits_thought: bool = True,
) -> TextOptions:
    limits = (sampled.max_completion_tokens, sampled.max_output_tokens, sampled.max_tokens)
    return TextOptions(
        max_new_tokens=next((limit for limit in limits if limit is not None), None),
        search=_search(sampled),
        stop=_stops(raw.get("stop")),
        grammar=grammar,
        alternatives=alternatives,
        splits_thought=splits_thought,
    )


def _search(sampled: Scalars) -> SearchOptions:
    """Any option of sampling samples, except a temperature of 0, which takes the likeliest token; none of them leaves
    it to the bundle."""
    seed = None if sampled.seed is None else sampled.seed % _SEEDS
    if sampled.temperature == 0 or sampled.top_p == 0:
        return SearchOptions(do_sample=False, repetition_penalty=sampled.repetition_penalty)
    is_sampled = (sampled.temperature, sampled.top_p, sampled.top_k) != (None, None, None)
    return SearchOptions(
        do_sample=True if is_sampled else None,
        temperature=sampled.temperature,
        top_p=sampled.top_p,
        top_k=sampled.top_k,
        random_seed=seed,
        repetition_penalty=sampled.repetition_penalty,
    )


def _stops(given: Json) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refusal("stop is no text and no array of texts", param="stop")
    if len(stops) > _MOST_STOPS:
        raise Refusal(f"stop has {len(stops)} texts, expected at most {_MOST_STOPS}", param="stop")
    return tuple(stops)


def _whole(raw: Mapping[str, Json], name: str, most: int) -> int | None:
    value = raw.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise Refusal(f"{name} is {value!r:.20}, expected a whole number up to {most}", param=name)
    return value


def _format(given: Json, under: str | None) -> str | None:
    """The rule of a response format; `under` is the key that its schema stands below, in chat completions."""
    if given is None or not isinstance(given, dict) or given.get("type") == "text":
        if given is not None and not isinstance(given, dict):
            raise Refusal("response_format is not an object", param="response_format")
        return None
    if given.get("type") == "json_object":
        return json_rule({"type": "object"})
    holder = given.get(under) if under else given
    schema = cast("dict[str, Json]", holder).get("schema") if isinstance(holder, dict) else None
    if given.get("type") != "json_schema" or not isinstance(schema, dict):
        raise Refusal("response_format is no text, json_object, or json_schema with a schema", param="response_format")
    return json_rule(schema)
