"""`manifest.json`: what a bundle was made from, and each of its files with size and SHA-256."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from toolkit import names
from toolkit.bundle.stop_tokens import StopToken
from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.side_files import side_paths
from toolkit.checkpoint.weights import Origin
from toolkit.errors import BundleError, RecipeError
from toolkit.files import FileEntry, digest_fits, file_entry, file_sha256, read_json, with_digest, write_json
from toolkit.machine import package_versions
from toolkit.recipe import Recipe, parse_recipe
from toolkit.target import TARGETS
from toolkit.typed_json import from_json, to_json

SCHEMA_VERSION: Final = 1
_MAX_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class CalibrationText:
    """The text that was read for weights or ranges; random weights read random ids, which have no hash."""

    name: str
    sha256: str | None = None


@dataclass(frozen=True)
class CalibratedOn:
    """What the text was computed on: `device` as `--device` names it, `software` with the version that decides the last
    bits of torch's products. Of an export that was resumed elsewhere it is the device that finished."""

    device: str
    software: str


@dataclass(frozen=True)
class ChangedFile:
    """A file that is not the checkpoint's own, or not read as it is meant: what is otherwise, a line each."""

    name: str
    why: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What a bundle was made from and consists of.

    `recipe` is the recipe as it was resolved, `precision` int4 or fp32, `versions` those of the packages that decide
    what comes out. `checkpoint` names the files that the weights were read from. `compiled` has, by the context stage
    of each part that was compiled ahead of time, a digest of all that its binary was made from. `stop_tokens` end an
    answer, each with where that is said. `changed` names the files of the checkpoint that the bundle has otherwise,
    `side_files` all of it beside the weights that were read. `calibrated_on` says what computed, where a text was read.
    `traced` is true where the graph was traced, and None where it was written from the family's description.
    """

    schema_version: int
    versions: dict[str, str]
    recipe: Recipe
    precision: str
    synthetic: bool
    checkpoint: tuple[Origin, ...]
    files: tuple[FileEntry, ...]
    calibration: CalibrationText | None = None
    compiled: dict[str, str] | None = None
    stop_tokens: tuple[StopToken, ...] = ()
    changed: tuple[ChangedFile, ...] = ()
    side_files: tuple[FileEntry, ...] = ()
    calibrated_on: CalibratedOn | None = None
    traced: bool | None = None

    def lasting_files(self) -> tuple[FileEntry, ...]:
        """Returns the files that stay as they were made: all but README.md, which is written anew with each report."""
        return tuple(entry for entry in self.files if entry.name != names.README_FILE)

    def with_files(self, changed: Iterable[FileEntry]) -> Manifest:
        """The manifest with these entries added, or put in place of those of the same name."""
        entries = {entry.name: entry for entry in (*self.files, *changed)}
        return replace(self, files=tuple(sorted(entries.values(), key=lambda entry: entry.name)))


@dataclass(frozen=True)
class _WrittenManifest:
    """A manifest as it lies in the file, but for its recipe, which has a reader of its own."""

    schema_version: int
    synthetic: bool
    files: tuple[FileEntry, ...]
    checkpoint: tuple[Origin, ...] = ()
    versions: dict[str, str] | None = None
    precision: str = "int4"
    calibration: CalibrationText | None = None
    compiled: dict[str, str] | None = None
    stop_tokens: tuple[StopToken, ...] = ()
    changed: tuple[ChangedFile, ...] = ()
    side_files: tuple[FileEntry, ...] = ()
    calibrated_on: CalibratedOn | None = None
    traced: bool | None = None


def begin_manifest(
    recipe: Recipe,
    precision: str,
    checkpoint: Checkpoint,
    stop_tokens: tuple[StopToken, ...],
    calibration: CalibrationText | None,
) -> Manifest:
    """The manifest of a bundle that has no files yet, its checkpoint known by name, size and time of change alone."""
    identity = checkpoint.source.identity()
    versions, synthetic = package_versions(), checkpoint.synthetic
    return Manifest(
        SCHEMA_VERSION,
        versions,
        recipe,
        precision,
        synthetic,
        identity,
        (),
        calibration,
        stop_tokens=stop_tokens,
        side_files=()
        if synthetic
        else tuple(_side_entry(path, checkpoint.folder) for path in side_paths(checkpoint.folder)),
        traced=checkpoint.config.traced or None,
    )


def _side_entry(path: Path, folder: Path) -> FileEntry:
    return replace(file_entry(path), name=path.relative_to(folder).as_posix())


def write_manifest(
    folder: Path, begun: Manifest, checkpoint: Checkpoint, files: Iterable[str], known: Mapping[str, str]
) -> Manifest:
    """Hashes `files` of `folder` and the checkpoint's, writes the manifest beside them and returns it.

    `known` has the SHA-256 of files that were hashed before.
    """
    entries = [file_entry(folder / name, known.get(name)) for name in files]
    manifest = replace(begun, checkpoint=checkpoint.source.digests()).with_files(entries)
    save_manifest(folder / names.MANIFEST_FILE, manifest)
    return manifest


def save_manifest(path: Path, manifest: Manifest) -> None:
    """Writes a manifest with its digest, whole or not at all."""
    write_json(path, with_digest(to_json(manifest)))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished bundle, made by this toolkit or an older one.

    Raises BundleError if there is none to read, or it says something that cannot be.
    """
    path = folder / names.MANIFEST_FILE
    raw = _read_raw(folder)
    lacking = [key for key in ("recipe", "files", "synthetic") if key not in raw]
    if lacking:
        raise BundleError(f"{path} says nothing of {' and '.join(lacking)}: export it again")
    try:
        written = from_json(_WrittenManifest, {"schema_version": SCHEMA_VERSION, **raw}, str(path))
        recipe = _recipe(raw["recipe"], str(path))
    except (ValueError, RecipeError) as problem:
        raise BundleError(f"{problem}: export it again") from None
    return Manifest(
        written.schema_version,
        written.versions or {},
        recipe,
        written.precision,
        written.synthetic,
        written.checkpoint,
        written.files,
        written.calibration,
        written.compiled,
        written.stop_tokens,
        written.changed,
        written.side_files,
        written.calibrated_on,
        written.traced,
    )


def verify_manifest(folder: Path, lasting_alone: bool = False) -> list[str]:
    """One line for each file that differs from the manifest, or for the manifest if it differs from its own digest;
    empty when all is well. `lasting_alone` leaves README.md out.

    Raises BundleError if there is no readable manifest.
    """
    problems, manifest = check_unedited(folder), read_manifest(folder)
    for entry in manifest.lasting_files() if lasting_alone else manifest.files:
        file = folder / Path(entry.name).name
        if not file.is_file():
            problems.append(f"{entry.name} is missing")
        elif (size := file.stat().st_size) != entry.bytes:
            problems.append(f"{entry.name} has {size} bytes, the manifest says {entry.bytes}")
        elif file_sha256(file) != entry.sha256:
            problems.append(f"{entry.name} differs from its SHA-256")
    return problems


def check_unedited(folder: Path) -> list[str]:
    """A line if the manifest was changed after it was written; none for one that is as it was, or has no digest yet."""
    if digest_fits(_read_raw(folder)):
        return []
    return [f"{names.MANIFEST_FILE} was changed after it was written: it differs from its digest"]


def _read_raw(folder: Path) -> dict[str, Any]:
    return read_json(folder / names.MANIFEST_FILE, _MAX_BYTES, BundleError, f"{folder} is not a finished bundle")


def _recipe(raw: object, where: str) -> Recipe:
    """The recipe of a manifest; what bundles had before there was a choice stands where an older one says nothing."""
    if not isinstance(raw, dict) or not isinstance(raw.get("target"), str):
        raise BundleError(f"{where}.recipe names no target")
    target = TARGETS.get(raw["target"])
    if target is None:
        raise BundleError(
            f"{where}: made for target {raw['target']!r}, which this toolkit does not know: known are "
            f"{', '.join(TARGETS)}"
        )
    has_own = not all(profile.name for profile in target.profiles)
    profile = "float16" if target.profiles and not has_own else ""
    before = {"parts": 1, "quality": "fast", "profile": profile}
    given = {key: value for key, value in raw.items() if value is not None}
    return parse_recipe({**before, **given}, f"{where}.recipe")
