"""The command line as a user runs it, in a process of its own or, where the process is not the point, in this one."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """`toolkit WORDS…` from the tree's root in a new process, with its exit code and what it wrote."""
    command = [sys.executable, "-m", "toolkit", *words]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)


def called(*words: str) -> subprocess.CompletedProcess[str]:
    """The same by a call of the entry point, which spares seconds of imports. An exception that would have been a
    traceback is raised."""
    from toolkit.cli.commands import main

    # As the interpreter sets them up.
    out, err = (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors, write_through=True)
        for errors in ("strict", "backslashreplace")
    )
    arguments, folder = sys.argv, Path.cwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    code: object = 0
    sys.argv = ["toolkit", *words]
    os.chdir(ROOT)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = arguments
        os.chdir(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    texts = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(list(words), code if isinstance(code, int) else int(code is not None), *texts)
