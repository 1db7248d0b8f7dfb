"""`manifest.json`: what a bundle was made from, and each of its files with size and SHA-256."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit import names
from toolkit.errors import BundleError
from toolkit.files import file_sha256, write_json
from toolkit.machine import package_versions
from toolkit.target import TARGETS


def write_manifest(
    folder: Path, files: list[str], request: dict[str, Any], known: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Hashes `files` of `folder`, writes the manifest beside them and returns it.

    `request` says what was asked; `known` has the SHA-256 of files that were hashed before.
    """
    manifest = {
        "schema_version": 1,
        "versions": package_versions(),
        **request,
        "files": [file_entry(folder / name, (known or {}).get(name)) for name in sorted(files)],
    }
    write_json(folder / names.MANIFEST_FILE, manifest)
    return manifest


def verify_manifest(folder: Path) -> list[str]:
    """One line for each file that differs from the manifest; empty when all is well.

    Raises BundleError if there is no readable manifest.
    """
    problems = []
    for entry in read_manifest(folder)["files"]:
        file = folder / Path(entry["name"]).name
        if not file.is_file():
            problems.append(f"{entry['name']} is missing")
        elif (size := file.stat().st_size) != entry["bytes"]:
            problems.append(f"{entry['name']} has {size} bytes, the manifest says {entry['bytes']}")
        elif file_sha256(file) != entry["sha256"]:
            problems.append(f"{entry['name']} differs from its SHA-256")
    return problems


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished bundle; raises BundleError if there is none to read."""
    try:
        manifest = json.loads((folder / names.MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), list):
        raise BundleError(f"{folder} has no readable {names.MANIFEST_FILE}: not a finished bundle")
    recipe: dict[str, Any] = manifest["recipe"] if isinstance(manifest.get("recipe"), dict) else {}
    files, known = manifest["files"], isinstance(recipe.get("name"), str) and isinstance(recipe.get("target"), str)
    if not known or "synthetic" not in manifest or not all(isinstance(f, dict) and "name" in f for f in files):
        raise BundleError(f"{folder / names.MANIFEST_FILE} says nothing of recipe, files or synthetic: export it again")
    if recipe["target"] not in TARGETS:
        raise BundleError(
            f"{folder} was made for target {recipe['target']!r}, which this toolkit does not know: known are "
            f"{', '.join(TARGETS)}"
        )
    recipe.setdefault("window", TARGETS[recipe["target"]].window)
    recipe.setdefault("soc", TARGETS[recipe["target"]].soc)
    # What bundles had before there was a choice.
    recipe.setdefault("profile", "float16" if TARGETS[recipe["target"]].profiles else "")
    recipe.setdefault("parts", 1)
    return manifest


def file_entry(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """Name, size and SHA-256 of a file, the last computed unless it is given."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256 or file_sha256(path)}
