"""Words that a person wrote: which known one is near, and whether one is a path."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path


def nearest(word: str, known: Sequence[str]) -> str:
    """Returns ` (did you mean 'x'?)`, or nothing if no known word is near."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def is_path(word: str) -> bool:
    """Whether a word for a text is a path (it has a suffix or folders) rather than a name to look up."""
    path = Path(word)
    return bool(path.suffix) or len(path.parts) > 1
