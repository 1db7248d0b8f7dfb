"""Pythons in environments of their own, made once into build/ and kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).resolve().parent.parent


def python_with(name: str, *words: str) -> Path:
    """The Python of build/`name`, into which pip has installed `words`, packages or options, from the root of the
    checkout."""
    folder = _ROOT / "build" / name
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    whole = folder / "installed"
    if not whole.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = ["install", "-q", "--disable-pip-version-check", *words]
        subprocess.run([python, "-m", "pip", *install], check=True, cwd=_ROOT)
        whole.touch()
    return python
