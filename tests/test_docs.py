"""What README and the pages say is so: programs run, commands are ones, generated pages are as generated."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
import yaml

from tests.exports import Exports
from toolkit.checkpoint.families import FAMILIES
from toolkit.cli.commands import commands

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Examples on how-to pages are pieces of the files they name; elsewhere the blocks of a page are one program.
PROGRAMS = [page for page in PAGES if page.parent.name != "how-to" and "```python" in page.read_text(encoding="utf-8")]
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
_COMMAND = re.compile(r"^\s*(?:\$ )?(?:python -m )?(toolkit [a-z].*)$")


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in _FENCED.findall(page.read_text(encoding="utf-8")) if kind == language]


def _commands(text: str) -> list[list[str]]:
    """The words after `toolkit` of each command line in indented and fenced blocks."""
    indented = [line for line in text.splitlines() if line.startswith("    ")]
    fenced = [
        line for kind, block in _FENCED.findall(text) if kind in ("", "bash", "console") for line in block.splitlines()
    ]
    found = [match[1] for line in indented + fenced if (match := _COMMAND.match(line))]
    return [words for line in found if "[OPTIONS]" not in line and (words := shlex.split(line, comments=True)[1:])]


def _parse(words: list[str]) -> None:
    """As the command line would, without running the command."""
    top = click.Context(commands, info_name="toolkit")
    name, command, rest = commands.resolve_command(top, words)
    assert name and command
    command.make_context(name, list(rest), parent=top)


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reader(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where a reader stands after the first command: build/tiny-r1-cpu is there."""
    folder = tmp_path_factory.mktemp("reader")
    exports.copy(folder / "build" / "tiny-r1-cpu", "cpu")
    return folder


@pytest.mark.parametrize("page", PROGRAMS, ids=_name)
def test_programs_run(page: Path, reader: Path, tmp_path: Path) -> None:
    shutil.copytree(reader, tmp_path, dirs_exist_ok=True)
    (tmp_path / "program.py").write_text("\n".join(_blocks(page, "python")), encoding="utf-8")
    # Sessions with one thread, as everywhere here: a second would spin beside the other process of the tests.
    one_thread = (
        "import runpy; from tests.in_process import single_threads\n"
        "with single_threads(): runpy.run_path('program.py', run_name='__main__')"
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", one_thread],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": path, "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stderr
    if page.name == "README.md":
        answers = [turn.split("</think>")[-1].split()[0] for turn in done.stdout.split("</think>")[1:]]
        assert answers == ["9", "17"], done.stdout


@pytest.mark.parametrize("page", [p for p in PAGES if p not in PROGRAMS and _blocks(p, "python")], ids=_name)
def test_pieces_of_files_are_python(page: Path) -> None:
    """A block is lines of a file, or entries of a dictionary there."""
    for block in _blocks(page, "python"):
        entries = block.lstrip().startswith('"')
        ast.parse(f"{{{block}}}" if entries else block)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_are_ones(page: Path) -> None:
    for words in _commands(page.read_text(encoding="utf-8")):
        _parse(words)


def test_a_wrong_command_is_seen() -> None:
    (words,) = _commands("    toolkit export 14b-cpu --dri-run   # the plan\n")
    with pytest.raises(click.UsageError):
        _parse(words)


def test_the_page_of_commands_is_as_written() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert text == _module("cli_page").page(), "run: python docs/cli_page.py"
    for name, command in commands.commands.items():
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        options = [
            option for p in command.params if isinstance(p, click.Option) for option in [*p.opts, *p.secondary_opts]
        ]
        assert all(option in section for option in options), name


def test_the_chart_is_of_the_log() -> None:
    drawn = _module("chart").chart((ROOT / "LOG.md").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "chart.svg").read_text(encoding="utf-8") == drawn, "run: python docs/chart.py"


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    entries = re.findall(r"[\w/-]+\.md", str(nav))
    pages = [p.relative_to(ROOT / "docs").as_posix() for p in PAGES if ROOT / "docs" in p.parents]
    assert sorted(entries) == sorted(pages)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8").replace("\n", " ")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_readme_is_about_a_hundred_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_every_family_has_a_row_that_names_its_proof() -> None:
    text = (ROOT / "docs" / "how-to" / "family.md").read_text(encoding="utf-8").split("## Families and their proofs")[1]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `") and "model_type" not in line]
    own = [row for row in rows if "[traced]" not in row[1]]
    assert sorted(name for row in own for name in re.findall(r"`(\w+)`", row[1])) == sorted(FAMILIES)
    for row in rows:
        proofs = re.findall(r"\]\(\.\./\.\./(tests/[^)]+)\)", row[4])
        source = "".join((ROOT / proof).read_text(encoding="utf-8") for proof in proofs)
        names = re.findall(r"`(\w+)`", row[1])
        assert proofs and ("CASES" in source if row in own else f'"{names[0]}"' in source), row[1]
