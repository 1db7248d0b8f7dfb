"""`manifest.json`: what a bundle was made from, and each of its files with size and SHA-256."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import toolkit
from toolkit import names
from toolkit.errors import BundleError
from toolkit.recipe import Recipe

_OUTSIDE: Final = {names.MANIFEST_FILE, names.REPORT_FILE, names.REPORT_PAGE_FILE}


def write_manifest(folder: Path, recipe: Recipe, precision: str, checkpoint_files: list[Path]) -> None:
    """Hashes every file of `folder` and of the checkpoint, and writes the manifest beside them."""
    manifest = {
        "schema_version": 1,
        "toolkit": toolkit.__version__,
        "recipe": asdict(recipe),
        "precision": precision,
        "synthetic": False,
        "checkpoint": [_entry(path) for path in checkpoint_files],
        "files": [_entry(path) for path in sorted(folder.iterdir()) if path.name not in _OUTSIDE],
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / names.MANIFEST_FILE).write_text(text, encoding="utf-8", newline="\n")


def verify_manifest(folder: Path) -> list[str]:
    """One line for each file that differs from the manifest; empty when all is well.

    Raises BundleError if there is no readable manifest.
    """
    path = folder / names.MANIFEST_FILE
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        problems = []
        for entry in files:
            file = folder / Path(entry["name"]).name
            if not file.is_file():
                problems.append(f"{entry['name']} is missing")
            elif (size := file.stat().st_size) != entry["bytes"]:
                problems.append(f"{entry['name']} has {size} bytes, the manifest says {entry['bytes']}")
            elif file_sha256(file) != entry["sha256"]:
                problems.append(f"{entry['name']} differs from its SHA-256")
    except (OSError, ValueError, KeyError, TypeError):
        raise BundleError(f"{folder} has no readable {names.MANIFEST_FILE}: not a finished bundle") from None
    return problems


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
