"""The place of a bundle: one writer at a time, a work folder beside it, the finished bundle where an older one stood.

A kill between any two steps leaves the old bundle, the new one, or a work folder that the same command goes on with.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from toolkit import names
from toolkit.errors import MachineError, RecipeError
from toolkit.files import check_writable, is_unicode, write_text
from toolkit.partition.data_files import JOURNAL_FILE

CALIBRATION_FOLDER: Final = "calibration"
# What marks a folder as this toolkit's work, and says what it was begun for.


@contextmanager
def held(bundles: Sequence[Path]) -> Iterator[None]:
    """Keeps other processes from writing these bundles meanwhile. Raises MachineError if one is being written already.

    The system releases what a killed process held.
    """
    with ExitStack() as stack:
        for bundle in sorted({Path(os.path.realpath(bundle)) for bundle in bundles}):
            key = hashlib.sha256(os.path.normcase(bundle).encode("utf-8", "surrogateescape")).hexdigest()[:32]
            lock = FileLock(Path(tempfile.gettempdir()) / f"toolkit-{key}.lock", timeout=0)
            try:
                stack.enter_context(lock)
            except (Timeout, PermissionError):
                raise MachineError(
                    f"{bundle} is being exported, compiled or validated by another process: wait for it, or name "
                    "another --out"
                ) from None
        yield


def followed(out: Path) -> Path:
    """`out`, or the folder that it leads to if it is a link, which then is what is made and replaced.

    Raises RecipeError for a link that leads nowhere.
    """
    try:
        leads_to = out.resolve() if out.is_symlink() or not out.name else out
        if not leads_to.is_symlink():
            return leads_to
    except OSError as problem:
        raise RecipeError(f"{out} can be no folder: {problem.strerror}: name another --out") from None
    except RuntimeError:  # a loop of links, before Python 3.13
        pass
    raise RecipeError(f"{out} is a link that leads nowhere: name another --out")


def check_place(out: Path) -> None:
    """Looks whether a bundle may be put at `out`, and changes nothing.

    Raises RecipeError for what is there and would be lost, MachineError where nothing can be written.
    """
    if not out.name:
        raise RecipeError(f"{out} cannot be a bundle: name a folder with --out")
    if not is_unicode(str(out)) or not out.name.isprintable():
        raise RecipeError(
            f"{str(out)!r} has bytes in its name that are no text, which runtimes do not open: name another"
        )
    _refuse_what_stands(out)
    above = next(path for path in out.absolute().parents if os.path.lexists(path))
    if not above.is_dir():
        raise RecipeError(f"{above} is no folder, and a bundle is to be made in it: name another --out")
    check_writable(above)


def checked_place(out: Path) -> Path:
    """`out` as a bundle may be put there, once what a kill left at the last step is finished.

    Raises as `check_place` does.
    """
    out = followed(out)
    if out.name and _replaced(out).exists() and not out.exists():
        os.replace(_replaced(out), out)
    check_place(out)
    if _is_finished(work_folder(out)):
        put_in_place(out)
    elif out.exists():
        (out / names.REQUEST_FILE).unlink(missing_ok=True)
    return out


def _refuse_what_stands(out: Path) -> None:
    work = work_folder(out)
    if not _is_ours(work):
        raise RecipeError(f"{work} is no work folder of the toolkit, and is where one would be: move it away")
    if out.exists() and not (out / names.MANIFEST_FILE).is_file():
        raise RecipeError(f"{out} exists and is not a bundle: name another --out, it will not be overwritten")
    if out.exists() and any(path.is_dir() for path in out.iterdir()):
        raise RecipeError(f"{out} is a bundle with folders inside, which would be lost: name another --out")
    if (out.parent / names.MANIFEST_FILE).is_file():
        raise RecipeError(f"{out.parent} is a bundle itself: name another --out")


def open_work(out: Path, request: str) -> Path:
    """The work folder; emptied unless it was begun by the same request on the same checkpoint."""
    shutil.rmtree(_replaced(out), ignore_errors=True)
    work = work_folder(out)
    marker = work / names.REQUEST_FILE
    if not (marker.is_file() and marker.read_bytes() == request.encode("utf-8")):
        work.mkdir(parents=True, exist_ok=True)
        # The mark goes last, by being replaced: whatever a kill leaves of the rest is known to be ours.
        for path in work.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != marker:
                path.unlink()
        write_text(marker, request)
    return work


def written_bytes(outs: Sequence[Path]) -> int:
    """Counts the bytes that interrupted runs already hold on the disk, a file of many names once; a sparse file's holes
    do not count where that is known."""
    stats = [path.stat() for out in outs for path in work_folder(out).glob("*.data")]
    files = {(stat.st_dev, stat.st_ino): stat for stat in stats}
    return sum(int(getattr(stat, "st_blocks", stat.st_size // 512) * 512) for stat in files.values())


def put_in_place(out: Path) -> None:
    """Makes the finished work folder the bundle, in place of an older one.

    What was needed to go on is removed first, so that no bundle is ever seen with it, and everything is on the disk
    before it gets the name.
    """
    work, replaced = work_folder(out), _replaced(out)
    for folder in [path for path in work.iterdir() if path.is_dir()]:
        shutil.rmtree(folder, ignore_errors=True)
    (work / JOURNAL_FILE).unlink(missing_ok=True)
    _sync(work)
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        os.replace(out, replaced)
    os.replace(work, out)
    _sync_folder(out.parent)
    (out / names.REQUEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(replaced, ignore_errors=True)


def work_folder(out: Path) -> Path:
    """Where a bundle is made: beside it, so that a rename suffices."""
    return out.with_name(out.name + ".partial")


def _is_ours(work: Path) -> bool:
    """Whether a work folder may be made or gone on with there: it has the mark, or a kill came while that was made."""
    if not work.exists() or (work / names.REQUEST_FILE).is_file():
        return True
    return work.is_dir() and {path.name for path in work.iterdir()} <= {f"{names.REQUEST_FILE}.new"}


def _is_finished(work: Path) -> bool:
    """Whether a kill came at the last step: everything is written, and what goes on is gone."""
    whole = all((work / name).is_file() for name in (names.REQUEST_FILE, names.MANIFEST_FILE, names.REPORT_FILE))
    return whole and not (work / JOURNAL_FILE).exists()


def _replaced(out: Path) -> Path:
    """Where an older bundle is for the moment between two renames: a name that no user would give."""
    return out.with_name(f".{out.name}.replaced-by-toolkit")


def _sync(folder: Path) -> None:
    """Brings every file of a folder, and its names, to the disk."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Brings a folder's names to the disk, where the system lets folders be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
