"""Published chat templates as shapes: what they do, without what they say.

    python -m benchmarks.template_shapes FOLDER tests/data/template_shapes.jsonl

Statements, expressions, keys, roles, white space and the markers of thoughts stay. Every other word, in text, literals
and comments, becomes a made-up one, the same for the same word. An even selection of the templates in FOLDER that
differ as shapes goes into the file, each with the conversations that still come out otherwise, or why it is refused.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Final

import jinja2
from jinja2.ext import loopcontrols

from benchmarks.templates import TOKENS
from toolkit.bundle.template_jinja import compile_template
from toolkit.errors import UnsupportedError
from toolkit.evaluate.renders import TemplateJob, best_template

_MAX_CHARACTERS: Final = 5000
_MAX_SHAPES: Final = 240
# A backslash with what it escapes, a marker of thoughts, a word.
_PIECES: Final = re.compile(r"\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\.|</?think>|[^\W\d_]+")
_KEY: Final = re.compile(r"[a-zA-Z_][a-zA-Z_.]{0,24}")


def shape(source: str) -> str:
    """The template with made-up words. Raises jinja2.TemplateSyntaxError for one that jinja2 cannot read."""
    words: dict[str, str] = {}

    def made_up(found: re.Match[str]) -> str:
        piece = found[0]
        if piece.startswith("\\") or "think>" in piece:
            return piece
        return words.setdefault(piece, _word(len(words)))

    environment = jinja2.Environment(extensions=[loopcontrols])
    written = []
    for _, kind, value in environment.lex(source):
        if kind in ("data", "comment", "raw_data"):
            written.append(_PIECES.sub(made_up, value))
        elif kind == "string" and not _KEY.fullmatch(value[1:-1]) and "%" not in value:
            written.append(_PIECES.sub(made_up, value))
        else:
            written.append(value)
    return "".join(written)


def _word(number: int) -> str:
    """Words of syllables: za, ze, …, zaza."""
    letters = ""
    while not letters or number:
        number, rest = divmod(number, 20)
        letters = "zkmr"[rest // 5] + "aeiou"[rest % 5] + letters
    return letters


def main(folder: Path, out: Path) -> None:
    """Writes the shapes of a folder's templates, a JSON object a line."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.jinja")):
        try:
            text = shape(path.read_bytes().decode("utf-8"))
            compile_template(text)
        except jinja2.TemplateError:  # a piece of a template
            continue
        if len(text) <= _MAX_CHARACTERS:
            found.setdefault(text, path.name.removesuffix(".jinja"))
    with out.open("w", encoding="utf-8", newline="\n") as file:
        every = [*found.items()]
        for number in range(min(len(every), _MAX_SHAPES)):
            text, name = every[number * len(every) // _MAX_SHAPES if len(every) > _MAX_SHAPES else number]
            row: dict[str, object] = {"name": name, "text": text}
            try:
                made = best_template(TemplateJob(text, TOKENS))
                row |= {"differs": made.differs} if made.differs else {}
            except UnsupportedError as problem:
                row["refused"] = str(problem)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
