"""The command line in a process of its own, as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """`toolkit WORDS…` from the tree's root, with its exit code and what it wrote."""
    command = [sys.executable, "-m", "toolkit", *words]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
