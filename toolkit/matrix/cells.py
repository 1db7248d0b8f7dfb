"""One cell of a matrix made: its command in a process of its own, tried again where the machine was at fault."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from toolkit.apart import python_module

# Seconds that a process has to leave by itself, once it was asked to.
_TO_LEAVE_S: Final = 30
# Exit codes of a command that did its work, whatever the verdict.
DONE: Final = (0, 1)
# What another try would say again.
_LASTING: Final = ("RecipeError", "UnsupportedError", "UsageError", "BundleError", "NonFiniteError", "Fault")
_INTERRUPTED: Final = 130


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, negative where a signal ended it, None where its time was over, and the line
    that says why it failed."""

    exit_code: int | None
    attempts: int
    seconds: float
    error: str | None = None


def run_cell(words: Sequence[str], log: Path, retries: int, timeout_s: float | None) -> Ended:
    """Runs `toolkit WORDS…`, whose lines go to `log`, and again if it failed for a reason that may pass; each try goes
    on where the last was."""
    begin, attempts = time.perf_counter(), 0
    with log.open("wb") as said:
        while True:
            attempts += 1
            code, document = _run([*python_module("toolkit"), *words, "--json"], said, timeout_s)
            kind, error = _failure(code, document, timeout_s)
            lasting = code in DONE or code == _INTERRUPTED or kind in _LASTING
            if lasting or attempts > retries:
                return Ended(code, attempts, time.perf_counter() - begin, None if code in DONE else error)


def _run(command: Sequence[str], said: IO[bytes], timeout_s: float | None) -> tuple[int | None, bytes]:
    """The exit code of a command, None where its time was over, and what it printed; it ends with this process."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said)
    try:
        printed, _ = child.communicate(timeout=timeout_s)
        return child.returncode, printed
    except subprocess.TimeoutExpired:
        return None, b""
    finally:
        if child.poll() is None:
            _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Asks a process to leave, which finishes what it writes, and ends it where it does not."""
    child.terminate()
    try:
        child.communicate(timeout=_TO_LEAVE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()


def _failure(code: int | None, document: bytes, timeout_s: float | None) -> tuple[str, str]:
    """The kind of a command's failure and the line it said."""
    if code is None:
        return "Timeout", f"not done within {timeout_s:.0f} s: raise timeout_s, or run again to go on"
    try:
        error = json.loads(document)["error"]
        return str(error["kind"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        how = f"was ended by signal {-code}" if code < 0 else f"left with exit code {code}"
        return "Died", f"its process {how} without a word: see its log"
