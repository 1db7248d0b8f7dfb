"""The toolkit's command line in a process of its own, as its users run it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from toolkit.errors import ToolkitError


def run_toolkit(words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Returns what `toolkit WORDS` prints, with some variables of the environment set for it. Raises ToolkitError with
    the last line that it says of what is wrong where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "toolkit", *words],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, **(environment or {})},
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"toolkit {words[0]} ended with {done.returncode}"]
        raise ToolkitError(said[-1].removeprefix("error: "))
    return done.stdout
