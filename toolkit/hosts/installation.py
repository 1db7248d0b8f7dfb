"""What is put where for a host: decided first, then carried out, and taken away again by the list of what was put."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.errors import BundleError, RecipeError
from toolkit.files import disk_errors, file_sha256, link_or_copy, read_state, write_state, write_text

# What marks a folder as one that `install` made, and lists what it put there.
MARK_FILE: Final = ".toolkit-install.json"
# Large files that nobody edits; others are copied, since who edits one in a host's folder does not mean the bundle.
_LINKED: Final = (".onnx", ".data", ".bin")


@dataclass(frozen=True)
class Installation:
    """One folder that is to be made for a host: `links` are files of bundles by their paths in it, `texts` what is
    written there, `then` what is left to the user, a line each, `notes` what the host may stumble over."""

    host: str
    folder: Path
    links: Mapping[str, Path]
    texts: Mapping[str, str]
    then: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def described(self) -> DescribedInstallation:
        """The same without contents, for people and programs."""
        return DescribedInstallation(
            self.host, str(self.folder), tuple(sorted(self.links)), tuple(sorted(self.texts)), self.then, self.notes
        )


@dataclass(frozen=True)
class DescribedInstallation:
    """What `toolkit install` did or would do: the folder, its files of the bundle, those written anew, what is left to
    the user, and what there is to know."""

    host: str
    folder: str
    of_the_bundle: tuple[str, ...]
    written: tuple[str, ...]
    then: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class InstalledFile:
    """A file that was put into a host's folder, `sha256` of what was written there; linked ones have none."""

    name: str
    sha256: str | None = None


@dataclass(frozen=True)
class Installed:
    """What the mark in a folder says: for which host, from which bundles, and every file by its path there."""

    host: str
    bundles: tuple[str, ...]
    files: tuple[InstalledFile, ...] = field(default_factory=tuple)


def check_installable(planned: Installation) -> None:
    """Raises RecipeError where something stands that `install` did not put there."""
    folder = planned.folder
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise RecipeError(f"{folder} is no folder of its own: name another with --name")
    if folder.exists() and any(folder.iterdir()) and read_mark(folder) is None:
        raise RecipeError(f"{folder} exists and `toolkit install` did not make it: name another with --name")
    for above in folder.parents:
        if (above / names.GENAI_CONFIG_FILE).is_file():
            raise RecipeError(f"{above} is a model itself, and {folder} would be inside it: name another --root")


def install_planned(planned: Installation) -> None:
    """Makes the folder anew; genai_config.json, which hosts look for, comes last of each folder. Raises RecipeError for
    a folder that is somebody else's, MachineError where it cannot be written."""
    check_installable(planned)
    folder = planned.folder
    with disk_errors(folder):
        if folder.exists() and read_mark(folder):
            remove_installed(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = sorted({*planned.links, *planned.texts}, key=lambda path: path.endswith(names.GENAI_CONFIG_FILE))
        sources = tuple(sorted({str(path.parent.resolve()) for path in planned.links.values()}))
        listed = Installed(planned.host, sources, tuple(InstalledFile(path) for path in paths))
        write_state(folder / MARK_FILE, listed)
        for path in paths:
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if path in planned.texts:
                write_text(place, planned.texts[path])
            elif place.suffix in _LINKED:
                link_or_copy(planned.links[path], place)
            else:
                shutil.copyfile(planned.links[path], place)
        small = {path: file_sha256(folder / path) for path in paths if (folder / path).suffix not in _LINKED}
        files = tuple(InstalledFile(path, small.get(path)) for path in paths)
        write_state(folder / MARK_FILE, Installed(planned.host, sources, files))


def remove_installed(folder: Path) -> list[str]:
    """Removes what `install` put into a folder, and the folder if nothing else is in it; returns the names of what was
    left, files of others among them. Raises BundleError for a folder that `install` did not make."""
    installed = read_mark(folder)
    if installed is None:
        raise BundleError(f"{folder} was not made by `toolkit install`: expected a folder with its {MARK_FILE}")
    with disk_errors(folder):
        for entry in installed.files:
            path = folder / entry.name
            if _is_inside(path, folder) and path.is_file():
                path.unlink()
        (folder / MARK_FILE).unlink()
        made = {folder / part for entry in installed.files for part in Path(entry.name).parents}
        for inner in sorted({folder, *made}, key=lambda path: len(path.parts), reverse=True):
            if _is_inside(inner, folder) and inner.is_dir() and not any(inner.iterdir()):
                inner.rmdir()
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) if folder.exists() else []


def read_mark(folder: Path) -> Installed | None:
    """What the mark in a folder says; None where `install` made none there."""
    return read_state(Installed, folder / MARK_FILE)


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path of the list leads nowhere else, through `..` or a link."""
    root = folder.resolve()
    return path.parent.resolve().is_relative_to(root) or path.resolve() == root
