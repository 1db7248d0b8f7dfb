"""A module in a process of its own: native code of vendors may crash, and memory is measured of one thing alone.

The parent calls `run_apart("toolkit.room.module", job)`; the module ends with

    if __name__ == "__main__":
        answer(function_of_the_job)

Job and answer, dataclasses or what JSON has, are JSON in files, so that nothing a library prints can be taken for
either. No fork: it works alike on every platform.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from toolkit.files import write_text
from toolkit.typed_json import to_json

_ERROR: Final = "error: "
_REASON_CHARACTERS: Final = 300


class ChildFailed(Exception):
    """The child ended without an answer. `reason` is its last line, in at most 300 characters, `output` all it wrote;
    `code` is its exit code, negative where a signal ended it."""

    def __init__(self, code: int, output: str) -> None:
        lines = [line for line in output.splitlines() if line.strip()]
        last = next((line for line in reversed(lines) if line.startswith(_ERROR)), lines[-1] if lines else "")
        self.code, self.output = code, output
        self.reason = last.removeprefix(_ERROR)[:_REASON_CHARACTERS] or f"exit code {code} and not a word"
        super().__init__(self.reason)


def run_apart(module: str, job: object, log: Path | None = None, timeout_s: float | None = None) -> Any:
    """What `python -m module` answers to `job`, both as JSON; raises ChildFailed if it does not.

    `log` keeps what it writes to stdout and stderr; its name is free to hold a file already, which is replaced. A child
    without an answer after `timeout_s` is ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, made, said = Path(folder) / "job.json", Path(folder) / "answer.json", log or Path(folder) / "log"
        write_text(given, json.dumps(to_json(job)))
        with said.open("wb") as output:
            command = [*python_module(module), str(given), str(made)]
            # UTF-8 whatever the system's code page says: the last line may name a file.
            environment = {**os.environ, "PYTHONUTF8": "1"}
            try:
                code = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, timeout=timeout_s
                ).returncode
            except subprocess.TimeoutExpired:
                raise ChildFailed(1, f"{_ERROR}no answer within {timeout_s:.0f} s") from None
        if code or not made.is_file():
            raise ChildFailed(code, said.read_text(encoding="utf-8", errors="replace"))
        return json.loads(made.read_text(encoding="utf-8"))


def python_module(module: str) -> list[str]:
    """The command that runs a module in this interpreter."""
    return [sys.executable, "-m", module]


def answer(work: Callable[[Any], object]) -> None:
    """In the child: does the job and ends the process. An error becomes the line that the parent shows."""
    given, made = map(Path, sys.argv[1:])
    try:
        write_text(made, json.dumps(to_json(work(json.loads(given.read_text(encoding="utf-8"))))))
    except Exception as problem:
        print(f"{_ERROR}{' '.join(str(problem).split()) or type(problem).__name__}", file=sys.stderr)
        _leave(1)
    _leave(0)


def _leave(code: int) -> None:
    """Ends the process without the finalizers of native code, which may crash when all is done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
