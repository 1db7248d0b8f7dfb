"""Grammars that onnxruntime-genai holds an answer to, in llguidance's Lark, around a thought that is left free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from toolkit.bundle.reasoning import BEGIN_OF_THOUGHT, END_OF_THOUGHT
from toolkit.evaluate.thought import opens_thought
from toolkit.typed_json import Json

# JSON as Python's json writes it: where any whitespace may stand, a small model writes it without end.
_SPELLING: Final = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}


def json_rule(schema: Mapping[str, Json]) -> str:
    """The rule of an answer that is JSON of a schema, and nothing else."""
    return "%json " + json.dumps({**schema, "x-guidance": _SPELLING})


def literal(text: str) -> str:
    """The rule of just this text."""
    return json.dumps(text, ensure_ascii=False)


def whole_grammar(prompt: str, answer: str) -> str:
    """The grammar of all that follows a prompt: a thought of any text, which the prompt may have begun, and an answer
    that keeps to its rule."""
    lines = [f"thought[suffix={literal(END_OF_THOUGHT)}]: /(.|\\n)*/", f"answer: {answer}"]
    if opens_thought(prompt):
        return "\n".join(['start: thought "\\n" answer', *lines])
    return "\n".join([f'start: ({literal(BEGIN_OF_THOUGHT)} thought "\\n")? answer', *lines])
