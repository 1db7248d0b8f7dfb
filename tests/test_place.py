"""Where bundles are made: one writer at a time, nothing of anybody else's touched, and every kill survived."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import called
from tests.exports import Exports
from toolkit.errors import MachineError, RecipeError
from toolkit.pipeline import place

WORDS = ["export", "tiny-r1-cpu", "--quality", "fast", "--no-validate"]


@pytest.fixture
def bundle(exports: Exports, tmp_path: Path) -> Path:
    out = tmp_path / "b"
    shutil.copytree(exports("cpu"), out)
    return out


def test_a_bundle_has_one_writer(tmp_path: Path) -> None:
    out = tmp_path / "b"
    code = (
        "import sys, pathlib; from toolkit.pipeline.place import held\n"
        "with held([pathlib.Path(sys.argv[1])]): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None and holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(MachineError, match="by another process"), place.held([tmp_path / "x" / ".." / "b"]):
        pass
    refused = called(*WORDS, "--out", str(out))
    assert refused.returncode == 2 and "by another process" in refused.stderr
    assert not out.exists() and not place.work_folder(out).exists()
    with place.held([tmp_path / "other"]):
        pass
    # What a killed process held is free.
    holder.kill()
    holder.wait()
    with place.held([out]):
        pass


def test_other_peoples_folders_stay(bundle: Path) -> None:
    """A backup called NAME.old, and a folder that happens to be where ours would be."""
    shutil.copytree(bundle, bundle.with_name("b.old"))
    theirs = bundle.with_name("b.partial")
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine", encoding="utf-8")
    refused = called(*WORDS, "--out", str(bundle))
    assert refused.returncode == 2 and "no work folder of the toolkit" in refused.stderr
    assert (theirs / "thesis.txt").read_text(encoding="utf-8") == "mine"
    shutil.rmtree(theirs)
    assert called(*WORDS, "--out", str(bundle)).returncode == 0
    assert (bundle.with_name("b.old") / "manifest.json").is_file()
    shutil.rmtree(bundle)
    assert called(*WORDS, "--out", str(bundle)).returncode == 0
    assert (bundle.with_name("b.old") / "manifest.json").is_file()


def _in_work(bundle: Path) -> Path:
    """The finished bundle as it is before its last step."""
    work = place.work_folder(bundle)
    bundle.rename(work)
    (work / "request.json").write_text(json.dumps({"of": "a test"}), encoding="utf-8")
    (work / "journal.jsonl").write_text("", encoding="utf-8")
    (work / "calibration").mkdir()
    (work / "calibration" / "state").write_text("x", encoding="utf-8")
    (work / ".b.partial-linked").mkdir()  # what a kill while it was being opened leaves
    return work


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("call", range(1, 9))
def test_a_kill_at_any_step_of_the_last_one_is_survived(
    bundle: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each change of the file system is a place to be killed; the next export finds the new bundle, or goes on."""
    older = bundle.with_name("older")
    shutil.copytree(bundle, older)
    (older / "of-before").write_text("x", encoding="utf-8")
    _in_work(bundle)
    older.rename(bundle)
    calls = 0

    def counted(name: str, real):  # type: ignore[no-untyped-def]
        def change(*arguments, **options):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls == call:
                raise _KilledError(name)
            return real(*arguments, **options)

        return change

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", counted("rmtree", shutil.rmtree))
        patched.setattr(os, "replace", counted("replace", os.replace))
        patched.setattr(Path, "unlink", counted("unlink", Path.unlink))
        try:
            place.put_in_place(bundle)
        except _KilledError:
            pass
        else:
            assert call > 6
    assert bundle.exists() or place.work_folder(bundle).exists()
    place.checked_place(bundle)
    standing = bundle if bundle.exists() else place.work_folder(bundle)
    assert (standing / "manifest.json").is_file() and not any(path.is_dir() for path in bundle.glob("*"))
    if not place.work_folder(bundle).exists():
        assert not (bundle / "request.json").exists()
        assert not (bundle / "of-before").exists(), "the new bundle is the one that stands"


def test_what_was_replaced_comes_back_if_the_new_one_never_came(bundle: Path) -> None:
    bundle.rename(bundle.with_name(".b.replaced-by-toolkit"))
    place.checked_place(bundle)
    assert (bundle / "manifest.json").is_file()


def test_names_that_cannot_be_bundles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be a bundle"):
        place.checked_place(Path("/"))
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(RecipeError, match="exists and is not a bundle"):
        place.checked_place(tmp_path / "file")
