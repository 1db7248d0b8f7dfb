"""What became of a matrix's cells when they were last made, kept beside their bundles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from toolkit.checkpoint.weights import Origin
from toolkit.files import read_state, write_state
from toolkit.pipeline.plan import ExportPlan
from toolkit.typed_json import Json, to_json

STATE_FILE: Final = "matrix.json"


@dataclass(frozen=True)
class MadeCell:
    """A cell that was made: the hash of its inputs, the exit code of its command, and what it took."""

    name: str
    input_hash: str
    exit_code: int
    seconds: float
    attempts: int


@dataclass(frozen=True)
class _HashedFiles:
    """The files of a checkpoint as they were found cheaply, and their digests."""

    seen: tuple[Origin, ...]
    digests: tuple[Origin, ...]


@dataclass(frozen=True)
class _State:
    cells: tuple[MadeCell, ...] = ()
    hashed: tuple[_HashedFiles, ...] = ()


class MatrixState:
    """The state of a matrix's folder, written whenever it changes."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / STATE_FILE
        self._state = read_state(_State, self._path) or _State()

    def made(self, name: str) -> MadeCell | None:
        """What is known of a cell by its name; None where it was never made here."""
        return next((cell for cell in self._state.cells if cell.name == name), None)

    def record(self, made: MadeCell) -> None:
        """Keeps what became of a cell, in place of what was known of it."""
        others = [cell for cell in self._state.cells if cell.name != made.name]
        self._state = replace(self._state, cells=(*others, made))
        write_state(self._path, self._state)

    def digests(self, plan: ExportPlan) -> Json:
        """What the files of a plan's checkpoint hold; those that look as they did are not read again."""
        source = plan.opened.source
        seen = source.identity()
        known = next((entry for entry in self._state.hashed if entry.seen == seen), None)
        if known is None:
            known = _HashedFiles(seen, source.digests())
            self._state = replace(self._state, hashed=(*self._state.hashed, known))
        return to_json(known.digests)
