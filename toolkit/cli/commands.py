"""The command line: `toolkit COMMAND`. Nothing heavy is imported before a command needs it.

Exit codes: 0 done; 1 the work ran and a verdict failed; 2 the request or its input is bad, or the machine lacks
something; 3 a fault of the toolkit itself; 130 and 143 an interrupt and a request to end.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from typing import NoReturn

import click

from toolkit import __version__
from toolkit.cli.compare import compare
from toolkit.cli.convert import compile_, export, inspect
from toolkit.cli.install import install, uninstall
from toolkit.cli.judge import bench, check, harness, validate, verify
from toolkit.cli.matrix import matrix
from toolkit.cli.serve import serve
from toolkit.cli.shelf import doctor, get, recipes
from toolkit.cli.stops import Stopped, end_at_once, heed_stops
from toolkit.cli.talk import chat, generate
from toolkit.errors import ToolkitError

_RESUMED = ("export", "compile", "matrix")
# Characters of a message: it may quote what it found.
_LONGEST = 1000
# What the system refuses for want of space, rights or handles, or of a path; other errors of it are the toolkit's.
_OF_THE_MACHINE = tuple(
    getattr(errno, name, -1)
    for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO EMFILE ENFILE ENOMEM ENAMETOOLONG ELOOP ESTALE".split()
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show a traceback on errors; the exit code stays.")
def commands(debug: bool) -> None:
    """Turns reasoning distills into ONNX bundles that onnxruntime-genai opens."""
    # main() reads it from the words themselves: it has to know it whatever fails.


for command in (export, compile_, validate, inspect, check, verify, generate, chat, serve, bench, harness, recipes):
    commands.add_command(command)
for command in (get, doctor, install, uninstall, compare, matrix):
    commands.add_command(command)


def main() -> None:
    """Runs a command and leaves with its exit code; what goes wrong is one line on stderr, and JSON on stdout too if
    `--json` is asked for."""
    words = sys.argv[1:]
    heed_stops()
    try:
        commands(standalone_mode=False)
    except Stopped as stop:
        # It leaves through the finalizers, which remove what is temporary.
        end_at_once()
        kind, how = ("Interrupted", "interrupted") if stop.is_interrupt else ("Terminated", "ended by a signal")
        _leave(words, stop.code, kind, _ended(how, words))
    except (click.exceptions.Abort, KeyboardInterrupt):
        _leave(words, 130, "Interrupted", _ended("interrupted", words))
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as problem:
        _leave(words, 2, "UsageError", problem.format_message())
    except ToolkitError as problem:
        _leave(words, 2, type(problem).__name__, str(problem))
    except MemoryError:
        _leave(words, 2, "MachineError", "the memory of this machine is used up: close other programs")
    except OSError as problem:
        if not _has_a_folder():
            _leave(words, 2, "MachineError", "the folder that this runs in is gone: change to another")
        if problem.errno not in _OF_THE_MACHINE:
            _fault(words, problem)
        where = f"{problem.filename}: " if problem.filename else ""
        _leave(words, 2, "MachineError", f"{where}{problem.strerror}, says the system: see to it and run again")
    except Exception as problem:
        _fault(words, problem)


def _has_a_folder() -> bool:
    """Whether the current folder still exists."""
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _fault(words: list[str], problem: Exception) -> NoReturn:
    """Says that the toolkit itself is wrong, and where to look."""
    said = " ".join(str(problem).split())[:300]
    _leave(
        words,
        3,
        "Fault",
        f"a fault of the toolkit itself, {type(problem).__name__}: {said}; "
        "`toolkit --debug …` shows where, please report it",
    )


def _ended(how: str, words: list[str]) -> str:
    """What to say of a command that was stopped: some go on from there."""
    named = next((word for word in words if not word.startswith("-")), "")
    return f"{how}; the same command goes on from here" if named in _RESUMED else how


def _leave(words: list[str], code: int, kind: str, message: str) -> NoReturn:
    """Says in one line what went wrong, as JSON too where that was asked for, and exits with the code."""
    message = " ".join(message.split())
    message = message if len(message) <= _LONGEST else f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 2 :]}"
    if "--debug" in words[:1] and sys.exc_info()[0] is not None:
        traceback.print_exc()
    if "--json" in words:
        document = {"error": {"kind": kind, "message": message, "exit_code": code}}
        _echo(json.dumps(document, indent=2))
    _echo(f"error: {message}", err=True)
    sys.exit(code)


def _echo(text: str, err: bool = False) -> None:
    """Prints what there is to say of a failure; where that cannot be written, the exit code has to do."""
    try:
        click.echo(text, err=err)
    except OSError:
        # Or the interpreter tries again as it ends, and complains.
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, 2 if err else 1)
