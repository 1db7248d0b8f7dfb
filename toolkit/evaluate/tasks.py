"""A task: questions with known answers, JSON lines that each say how an answer is checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from toolkit.errors import RecipeError
from toolkit.evaluate.checkers import CHECKERS, default_checker
from toolkit.files import is_unicode, read_text
from toolkit.recipe import nearest

# The words of published files: GSM8K's question and answer, MATH's problem and solution.
_QUESTIONS: Final = ("question", "problem")
_ANSWERS: Final = ("answer", "solution")
_MAX_BYTES: Final = 1 << 30


@dataclass(frozen=True)
class Question:
    """`text` is a whole prompt, chat format included, or where `plain` what the bundle's chat template goes around."""

    line: int
    text: str
    plain: bool
    answer: str
    checker: str

    def is_right(self, text: str | None) -> bool:
        """Returns whether the text after the thought gives the answer; None, a thought that never ended, does not."""
        return text is not None and CHECKERS[self.checker].is_right(text.strip(), self.answer)


@dataclass(frozen=True)
class Task:
    """Questions to ask, named after the file they are from."""

    name: str
    questions: tuple[Question, ...]


def read_task(path: Path, examples: int | None = None) -> Task:
    """Returns the first `examples` lines of a JSONL file.

    A line has a `prompt`, whole, or a plain `question` (or `problem`); an `answer` (or `solution`); and it may have a
    `checker`: without one it is exact, but a number after GSM8K's `####`, and boxed where MATH's solution has a box.
    Raises RecipeError with the line that is not so.
    """
    if not path.exists():
        raise RecipeError(f"task {path.stem!r} has no questions: there is no file {path}")
    content = read_text(path, _MAX_BYTES, RecipeError, mark_too=True)
    # Not splitlines(), which also splits at separators that JSON strings may hold.
    lines = [(k, line) for k, line in enumerate(content.split("\n"), 1) if line.strip()][:examples]
    if not lines:
        raise RecipeError(f"{path} is empty: expected JSON lines, each with a prompt or question, and an answer")
    return Task(path.stem, tuple(_question(line, k, f"{path}, line {k}") for k, line in lines))


def _question(text: str, number: int, where: str) -> Question:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise RecipeError(f"{where} is not JSON: {str(problem)[:120]}") from None
    if not isinstance(line, dict):
        raise RecipeError(f"{where} holds a {type(line).__name__}, expected an object with a question and an answer")
    if "\\u" in text and not is_unicode(line):
        raise RecipeError(f"{where} holds half of a surrogate pair, an escape such as \\ud800, which is no text")
    prompt, question, answer = _word(line, ("prompt",)), _word(line, _QUESTIONS), _word(line, _ANSWERS)
    if answer is None or not (asked := prompt or question):
        keys = ", ".join(map(str, line))[:120] or "nothing"
        raise RecipeError(f"{where} has {keys}: expected a prompt or question, and an answer, as text")
    checker = line.get("checker", default_checker(_word(line, ("solution",)) or answer))
    if not isinstance(checker, str) or checker not in CHECKERS:
        hint = nearest(str(checker), list(CHECKERS))
        raise RecipeError(f"{where}: checker {checker!r:.60} is unknown{hint}, expected {', '.join(CHECKERS)}")
    if CHECKERS[checker].expected(answer) is None:
        raise RecipeError(f"{where}: checker {checker!r} finds nothing to compare with in the answer {answer[-60:]!r}")
    return Question(number, asked, prompt is None, answer, checker)


def _word(line: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first of the keys that holds text, or a number, which is written out."""
    for key in keys:
        value = line.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and value.strip():
            return value
    return None
