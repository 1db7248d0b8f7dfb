"""Running another tool: what it cost, and what is said when it is missing or fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from toolkit.errors import ToolkitError

# Seconds between looks at a process: often while it is young, for some end at once; later its peak is rarely missed.
_POLL_S: Final = (0.002, 0.05)


class PeerError(ToolkitError):
    """A tool is not here and cannot be made, or failed on this checkpoint; its rows are left out."""


@dataclass(frozen=True)
class Cost:
    """Seconds from start to end of a process, and the most memory it held."""

    wall_s: float
    peak_rss_bytes: int


def program(name: str) -> str | None:
    """The path of a program beside this Python or on PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def own_python(folder: Path, name: str, packages: Sequence[str]) -> Path:
    """The Python of an environment with these packages, made in `folder` the first time. Raises PeerError if it cannot
    be."""
    environment = folder / name
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    whole = environment / "installed"
    if not whole.exists():
        run_tool([sys.executable, "-m", "venv", "--clear", str(environment)], folder / f"{name}-venv.log")
        install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages]
        run_tool(install, folder / f"{name}-install.log")
        whole.touch()
    return python


def run_tool(command: list[str], log: Path, environment: Mapping[str, str] | None = None) -> Cost:
    """Runs a command to its end, its output in `log`. Raises PeerError with its complaint if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    begin, peak = time.perf_counter(), 0
    with log.open("wb") as output:
        try:
            child = psutil.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
            )
        except OSError as problem:
            raise PeerError(f"{command[0]} cannot be started: {problem.strerror}") from None
        try:
            while child.poll() is None:
                peak = max(peak, _peak_rss_bytes(child))
                time.sleep(min(max(_POLL_S[0], (time.perf_counter() - begin) / 100), _POLL_S[1]))
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        raise PeerError(f"{Path(command[0]).name} failed with {child.returncode}: {_complaint(log)} ({log})")
    return Cost(time.perf_counter() - begin, peak)


def _peak_rss_bytes(process: psutil.Process) -> int:
    """The system's own high-water mark where it keeps one that a fork did not start, else what is held now."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        pass
    try:
        memory = process.memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    except psutil.Error:
        return 0


def _complaint(log: Path) -> str:
    """The first line that calls itself an error, else the last line: later errors of build tools follow from it."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()]
    return (errors[:1] or lines or ["it said nothing"])[-1][:200]
