"""Files that are whole or not there, and modules that run in a process of their own."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path

import pytest

from toolkit.apart import ChildFailed, run_apart
from toolkit.errors import BundleError
from toolkit.files import file_sha256, read_json, replacing, write_json, write_text


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_replaced_is_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old\n")
    with replacing(path) as fresh:
        fresh.write_text("half", encoding="utf-8")
        assert path.read_bytes() == b"old\n"
        fresh.write_text("new", encoding="utf-8")
    assert path.read_bytes() == b"new" and _names(tmp_path) == ["a.json"]


def test_what_fails_half_way_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as fresh:
        fresh.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert path.read_bytes() == b"old" and _names(tmp_path) == ["a.json"]


def test_what_a_kill_left_is_not_written_into(tmp_path: Path) -> None:
    """It may be another name of a finished bundle's file."""
    (tmp_path / "finished").write_bytes(b"precious")
    os.link(tmp_path / "finished", tmp_path / "a.new")
    write_text(tmp_path / "a", "mine")
    assert (tmp_path / "finished").read_bytes() == b"precious" and (tmp_path / "a").read_bytes() == b"mine"


def test_json_is_utf8_with_line_ends_of_one_byte(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": [1, "\n"]})
    assert (tmp_path / "a.json").read_bytes() == '{\n  "é": [\n    1,\n    "\\n"\n  ]\n}\n'.encode()
    assert read_json(tmp_path / "a.json", 100, BundleError, "there is one") == {"é": [1, "\n"]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing: a bundle has one"),
        (b"{" + b" " * 100 + b"}", "has more than 100 bytes"),
        (b"{", "is not valid JSON"),
        (b"\xff{}", "is not valid JSON"),
        (b"[" * 90, "is not valid JSON"),
        (b"[]", "holds a JSON list, expected an object"),
    ],
)
def test_what_cannot_be_read_is_one_line_of_the_error_asked_for(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=words) as said:
        read_json(path, 100, BundleError, "a bundle has one")
    assert str(path) in str(said.value) and "\n" not in str(said.value)


def test_the_hash_is_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that does what its job says."""
    text = """
import os, sys
from toolkit.apart import answer

def work(job):
    print("a library says [1, 2]")
    print("and complains", file=sys.stderr)
    exec(job["do"])
    return {"got": job["value"], "pid": os.getpid()}

if __name__ == "__main__":
    answer(work)
"""
    (tmp_path / "worker_of_a_test.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    return "worker_of_a_test"


def test_a_module_apart_answers_whatever_is_printed(module: str, tmp_path: Path) -> None:
    value = {"path": "Grüße \udcff", "n": [1, 2.5, None]}
    found = run_apart(module, {"do": "", "value": value}, tmp_path / "log")
    assert found["got"] == value and found["pid"] != os.getpid()
    lines = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert sorted(lines) == ["a library says [1, 2]", "and complains"]


@pytest.mark.parametrize(
    ("do", "code", "reason"),
    [
        ("raise ValueError('no ' + 'good\\nat all: é')", 1, "no good at all: é"),
        ("raise ValueError('x' * 1000)", 1, "x" * 300),
        ("raise KeyError", 1, "KeyError"),
        ("os._exit(7)", 7, "and complains"),
        ("sys.stderr = open(os.devnull, 'w'); os._exit(0)", 0, "and complains"),
        (f"os.kill(os.getpid(), {int(signal.SIGTERM)})", -15 if os.name == "posix" else 15, "and complains"),
    ],
)
def test_how_a_module_ended_is_its_last_line(module: str, do: str, code: int, reason: str) -> None:
    with pytest.raises(ChildFailed) as said:
        run_apart(module, {"do": do, "value": 0})
    assert (said.value.code, said.value.reason) == (code, reason) and "and complains" in said.value.output


def test_a_module_that_says_nothing_is_told_by_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "silent_in_a_test.py").write_text("raise SystemExit(5)", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ChildFailed, match="exit code 5"):
        run_apart("silent_in_a_test", {})
