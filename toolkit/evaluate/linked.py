"""A bundle's files under other settings: links beside them, so that nothing is copied and the bundle stays as it is."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from toolkit import names
from toolkit.bundle.settings import Settings
from toolkit.files import disk_error, link_or_copy
from toolkit.machine import is_running


def linked_copy(bundle: Path, settings: Settings, within: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """Returns a folder beside the bundle, or `within` another, with its files by other names and settings of its own.

    The name holds the number of this process; what processes left that were killed goes first. Raises MachineError
    where nothing can be written.
    """
    place, begins = within or bundle.parent, f".{bundle.name}-on-cpu-"
    try:
        _remove_left(place, begins)
        folder = tempfile.TemporaryDirectory(prefix=f"{begins}{os.getpid()}-", dir=place, ignore_cleanup_errors=True)
        for path in bundle.iterdir():
            if path.name != names.GENAI_CONFIG_FILE and path.is_file():
                link_or_copy(path, Path(folder.name) / path.name)
        (Path(folder.name) / names.GENAI_CONFIG_FILE).write_text(settings.text, encoding="utf-8")
    except OSError as problem:
        raise disk_error(problem, place) from None
    return folder


def _remove_left(place: Path, begins: str) -> None:
    """Removes the linked copies whose processes ended without."""
    for path in place.iterdir():
        number = path.name.removeprefix(begins).partition("-")[0] if path.name.startswith(begins) else ""
        if number.isdecimal() and not is_running(int(number)):
            shutil.rmtree(path, ignore_errors=True)
