"""Writes docs/cli.md from the commands themselves: `python docs/cli_page.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from toolkit.cli.commands import commands

PAGE: Final = Path(__file__).resolve().parent / "cli.md"
_HEAD: Final = """# Command line

`toolkit COMMAND --help` says the same. `toolkit --debug COMMAND …` shows a traceback on errors, `toolkit --version` the
version; `python -m toolkit` is the same program. `--json` puts one JSON document on stdout and everything else on
stderr. Exit codes: 0 done, 1 the work ran and a verdict failed, 2 the request, its input or the machine will not do
(the last line on stderr is `error: …`), 3 a fault of the toolkit's own.

This page is written by `python docs/cli_page.py`.
"""


def page() -> str:
    """The whole page, a section a command."""
    top = click.Context(commands, info_name="toolkit")
    return "\n".join([_HEAD, *(_section(top, name) for name in commands.list_commands(top))])


def _section(top: click.Context, name: str) -> str:
    command = commands.commands[name]
    context = click.Context(command, info_name=name, parent=top)
    rows = [record for p in command.params if isinstance(p, click.Option) and (record := p.get_help_record(context))]
    table = [f"| `{_cell(names)}` | {_cell(text)} |" for names, text in rows]
    usage = " ".join([f"toolkit {name}", *command.collect_usage_pieces(context)])
    help_text = "\n\n".join(" ".join(piece.split()) for piece in (command.help or "").split("\n\n"))
    return "\n".join(
        [f"## {name}", "", f"    {usage}", "", help_text, "", "| option | what |", "|---|---|", *table, ""]
    )


def _cell(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
