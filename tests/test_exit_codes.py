"""How a command ends: its exit code, its last line, and what stands on stdout for a program that reads it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from toolkit.cli import commands

RUN = [sys.executable, "-m", "toolkit"]


def _run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["toolkit", *words])
    with pytest.raises(SystemExit) as left:
        commands.main()
    return int(left.value.code or 0)


def _break(monkeypatch: pytest.MonkeyPatch) -> None:
    def verify_manifest(_: Path) -> list[str]:
        raise ValueError("a list\nof two lines")

    monkeypatch.setattr("toolkit.bundle.manifest.verify_manifest", verify_manifest)
    monkeypatch.setattr("toolkit.report.intact.verify_bundle", verify_manifest)


def test_a_bad_request_is_2_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert _run(monkeypatch, "verify", str(tmp_path)) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert _run(monkeypatch, "verify", "--no-such-option", str(tmp_path)) == 2
    assert capsys.readouterr().err.startswith("error: No such option")


def test_a_fault_of_the_toolkit_is_3_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _break(monkeypatch)
    assert _run(monkeypatch, "verify", str(tmp_path)) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "ValueError: a list of two lines" in said and "--debug" in said


def test_debug_shows_where_and_keeps_the_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert _run(monkeypatch, "--debug", "verify", str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.splitlines()[-1].startswith("error: ")
    _break(monkeypatch)
    assert _run(monkeypatch, "--debug", "verify", str(tmp_path)) == 3
    assert "Traceback" in capsys.readouterr().err


def test_errors_are_json_for_who_asked_for_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert _run(monkeypatch, "verify", str(tmp_path), "--json") == 2
    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    assert error["kind"] == "BundleError" and error["exit_code"] == 2
    assert said.err == f"error: {error['message']}\n"
    _break(monkeypatch)
    assert _run(monkeypatch, "verify", str(tmp_path), "--json") == 3
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 3


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no such signals to one process")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_says_truly_what_is_left(number: int, code: int, tmp_path: Path) -> None:
    """Only what goes on from where it was says so."""
    words = ["export", "tiny-r1-cpu", "--quality", "best", "--out", str(tmp_path / "b"), "--no-validate"]
    process = subprocess.Popen([*RUN, *words], stderr=subprocess.PIPE, text=True, encoding="utf-8")
    deadline = time.monotonic() + 60
    while not (tmp_path / "b.partial").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said.splitlines()[-1].startswith("error: ") and "goes on from here" in said.splitlines()[-1]
    assert "goes on from here" not in commands._ended("interrupted", ["validate", "x"])


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
def test_a_reader_that_has_enough_is_no_error() -> None:
    process = subprocess.Popen([*RUN, "recipes", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() in (0, 1)
