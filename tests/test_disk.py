"""What the system refuses, a full disk, a folder that cannot be written, is one line and leaves nothing half done."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.command_line import called
from tests.exports import Exports
from toolkit import library
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.cli import commands
from toolkit.errors import MachineError, RecipeError, ToolkitError
from toolkit.files import disk_error, disk_errors, write_json
from toolkit.pipeline import place
from toolkit.pipeline.export import check_exports
from toolkit.pipeline.plan import ExportPlan, plan_export
from toolkit.recipe import load_recipe
from toolkit.report.summary import load_report, write_report

WORDS = ["export", "tiny-r1-cpu", "--quality", "fast", "--no-validate"]


@pytest.mark.parametrize(
    ("number", "file", "said"),
    [
        (errno.ENOSPC, None, "/b cannot be written: No space left on device; free space and run again"),
        (errno.EFBIG, "/x/b.partial/a", "/x/b.partial/a cannot be written: File too large; free space and run again"),
        (errno.EACCES, "/x/b/report.json.new", "cannot be written: Permission denied; make it writable"),
        (errno.EROFS, "/x/.b.partial-1/a", "make it writable, or name another place"),
        (errno.ENAMETOOLONG, "/x/bbb", "cannot be written: File name too long; name another place"),
        (errno.EACCES, "/x/checkpoint/model.safetensors", "model.safetensors cannot be read or written: Permission"),
        (errno.ENOENT, "/y/b/text.jsonl", "text.jsonl cannot be read or written: No such file"),
    ],
)
def test_what_the_system_refuses_is_named_as_it_is(number: int, file: str | None, said: str) -> None:
    problem = OSError(number, os.strerror(number), file) if file else OSError(number, os.strerror(number))
    found = disk_error(problem, Path("/x/b"))
    assert isinstance(found, MachineError) and said in str(found).replace("\\", "/")
    assert ("free space" in str(found)) == (number in (errno.ENOSPC, errno.EFBIG))


def test_a_full_disk_while_a_report_is_written(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_r1: Path
) -> None:
    bundle = exports.copy(tmp_path / "b", "cpu")
    before = (bundle / "report.json").read_bytes()
    write = Path.write_text

    def full(path: Path, text: str, **how: str) -> int:
        if path.name == "report.json.new":
            write(path, text[:100], **how)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, text, **how)

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(
        "toolkit.pipeline.judge.judge_bundle", lambda where, *_: write_report(where, load_report(where))
    )
    with pytest.raises(MachineError, match="cannot be written: No space left on device; free space"):
        library.validate(bundle, open_checkpoint(tiny_r1))
    assert (bundle / "report.json").read_bytes() == before and not list(bundle.glob("*.new"))


def test_a_bundle_that_cannot_be_written_is_refused_before_it_is_measured(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_r1: Path
) -> None:
    """Permissions do not bind an administrator, so the system's answer is put in its place."""
    bundle = exports.copy(tmp_path / "b", "qnn")
    monkeypatch.setattr(os, "access", lambda *_: False)
    for work in (lambda: library.validate(bundle, open_checkpoint(tiny_r1)), lambda: library.compile(bundle)):
        with pytest.raises(MachineError, match="read-only"):
            work()


@pytest.fixture
def plan(tiny_r1: Path, tmp_path: Path) -> ExportPlan:
    return plan_export(load_recipe("tiny-r1-cpu"), open_checkpoint(tiny_r1), tmp_path / "b", "int4")


def test_a_dry_run_fails_where_the_export_cannot(
    plan: ExportPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_exports([plan])
    with pytest.raises(MachineError, match="the disk has 0 MiB free"):
        check_exports([replace(plan, disk_free_bytes=0)])
    with pytest.raises(MachineError, match="File name too long; name another place"):
        check_exports([replace(plan, out=tmp_path / ("n" * 250))])
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(RecipeError, match="is no folder"):
        check_exports([replace(plan, out=tmp_path / "file" / "b")])
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(MachineError, match="read-only"):
        check_exports([plan])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_dry_run_into_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine", encoding="utf-8")
    done = called("export", "tiny-r1-cpu", "--dry-run", "--out", str(tmp_path / "b"))
    assert done.returncode == 2 and "exists and is not a bundle" in done.stderr.splitlines()[-1]
    assert "bits per weight" in done.stdout


def _link(path: Path, to: Path) -> None:
    try:
        path.symlink_to(to, target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links for ordinary users")


def test_a_link_is_followed_every_time(exports: Exports, tmp_path: Path) -> None:
    """The first time it leads nowhere yet, the second to a bundle."""
    (tmp_path / "large").mkdir()
    link, held = tmp_path / "b", tmp_path / "large" / "store"
    _link(link, held)
    assert place.followed(link) == held
    for force in ([], ["--force"]):
        done = called(*WORDS, "--out", str(link), *force)
        assert done.returncode == 0, done.stderr
        assert link.is_symlink() and (held / "manifest.json").is_file()
        assert [path.name for path in (tmp_path / "large").iterdir()] == ["store"]
    shutil.rmtree(held)
    (held).mkdir()
    (held / "thesis.txt").write_text("mine", encoding="utf-8")
    refused = called(*WORDS, "--out", str(link))
    assert refused.returncode == 2 and "exists and is not a bundle" in refused.stderr


def test_a_link_to_itself_is_refused(tmp_path: Path, tiny_r1: Path) -> None:
    _link(tmp_path / "b", tmp_path / "b")
    with pytest.raises(RecipeError, match="leads nowhere"):
        plan_export(load_recipe("tiny-r1-cpu"), open_checkpoint(tiny_r1), tmp_path / "b", "int4")


def test_other_errors_of_the_system_are_no_faults_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verify(number: int) -> None:
        def refuse(_: Path) -> None:
            raise OSError(number, os.strerror(number), "some.json")

        monkeypatch.setattr("toolkit.report.intact.verify_bundle", refuse)
        monkeypatch.setattr("sys.argv", ["toolkit", "verify", str(tmp_path)])
        commands.main()

    for number, code in ((errno.ENOSPC, 2), (errno.EMFILE, 2), (errno.ENOENT, 3)):
        with pytest.raises(SystemExit) as left:
            verify(number)
        said = capsys.readouterr().err
        assert left.value.code == code and said.count("\n") == 1 and "some.json" in said


def test_what_raises_within_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="mine"), disk_errors(tmp_path):
        raise ToolkitError("mine")
    with pytest.raises(MachineError, match="cannot be written"), disk_errors(tmp_path / "b"):
        (tmp_path / "b").mkdir()
        write_json(tmp_path / "b", {})
