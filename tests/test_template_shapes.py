"""The shapes of published chat templates: each renders in onnxruntime-genai what the original renders in jinja2, once
the toolkit has written it, for one, two and three turns, thoughts, system prompts and tools; or it is an exception.

`tests/data/template_shapes.jsonl` is made by `python -m benchmarks.template_shapes` from templates in public
repositories under the Apache and MIT licences: what they do, with made-up words for what they say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from benchmarks.templates import TOKENS
from toolkit.errors import UnsupportedError
from toolkit.evaluate.renders import TemplateJob, best_template

_FILE: Final = Path(__file__).parent / "data" / "template_shapes.jsonl"
_SHAPES: Final[list[dict[str, Any]]] = [json.loads(line) for line in _FILE.read_text(encoding="utf-8").splitlines()]
# So many at a time: each takes a moment, and is reported by its name.
_AT_ONCE: Final = 12
# Why a template is refused, as its line says.
_REASONS: Final = (
    "leaves out what is asked",  # a piece of one
    "renders no conversation in jinja2",  # it is for pictures or sound, or not for messages
    "uses caller, which is not known",
    "tojson(ensure_ascii=…)",
    "lacks",  # a filter or method of jinja2's that has no equivalent
    "does not know",
    "is not known",
)


@pytest.mark.parametrize("first", range(0, len(_SHAPES), _AT_ONCE))
def test_a_template_renders_as_in_jinja2_or_is_an_exception(first: int) -> None:
    for row in _SHAPES[first : first + _AT_ONCE]:
        try:
            made = best_template(TemplateJob(row["text"], TOKENS))
        except UnsupportedError as problem:
            assert str(problem) == row.get("refused"), row["name"]
        else:
            assert ([*made.differs], None) == (row.get("differs", []), row.get("refused")), row["name"]


def test_two_hundred_render_and_the_exceptions_have_reasons() -> None:
    assert sum("differs" not in row and "refused" not in row for row in _SHAPES) >= 200
    assert len({row["text"] for row in _SHAPES}) == len(_SHAPES)
    for row in _SHAPES:
        assert any(reason in row["refused"] for reason in _REASONS) if "refused" in row else True, row["name"]
