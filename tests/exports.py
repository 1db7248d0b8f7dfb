"""Bundles that tests share: each is exported once a session, and is to be read only."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.graphs import EIGHT_BITS, export_bundle
from toolkit.bundle.manifest import verify_manifest
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.recipe import load_recipe

# qnn as several files want it: small, and split.
IN_TWO_PARTS = ("parts=2", "context_length=256", "window=32", *EIGHT_BITS)


class Exports:
    """Exports of tiny-r1 by recipe, changes and precision, made when they are first asked for."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self._checkpoint, self._folder = checkpoint, folder
        self._made: dict[tuple[str, tuple[str, ...], str], Path] = {}

    def __call__(self, target: str, changes: tuple[str, ...] = EIGHT_BITS, precision: str = "int4") -> Path:
        """The bundle of `tiny-r1-TARGET`; whoever would change a file of it takes a `copy`."""
        key = target, changes, precision
        if key not in self._made:
            recipe, out = load_recipe(f"tiny-r1-{target}", changes), self._folder / f"{target}-{len(self._made)}"
            self._made[key] = export_bundle(recipe, open_checkpoint(self._checkpoint), out, precision)
        return self._made[key]

    def copy(self, folder: Path, target: str, changes: tuple[str, ...] = EIGHT_BITS, precision: str = "int4") -> Path:
        """The same bundle's files in another folder, to do with as one likes."""
        return Path(shutil.copytree(self(target, changes, precision), folder))

    def spoilt(self) -> list[str]:
        """What is no longer as it was exported."""
        return [f"{bundle.name}: {problem}" for bundle in self._made.values() for problem in verify_manifest(bundle)]
