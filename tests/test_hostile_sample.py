"""A seeded sample of `make test-hostile`: every parser, and stops at some events; the campaigns themselves count."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings

from tests.command_line import ROOT
from tests.hostile.__main__ import batches
from tests.hostile.mutants import ODD_VALUES, damaged_bytes, damaged_json, places
from tests.hostile.parsers import PARSERS
from tests.hostile.sandbox import Sandbox


def _campaign(module: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *options]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)


def test_a_sample_of_damaged_input_is_accepted_or_refused_in_one_line() -> None:
    done = _campaign("tests.hostile", "--mutants", "200", "--seed", "7")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = {line[:20].strip(): [int(word) for word in line[20:].split()] for line in done.stdout.splitlines()[2:-1]}
    assert set(rows) == {parser.name for parser in PARSERS} | {"all"}
    mutants, accepted, refused, failed = rows["all"]
    assert mutants >= 200 and accepted >= 20 and refused >= 50 and failed == 0


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_stops_at_some_events_are_gone_on_with() -> None:
    done = _campaign("tests.hostile.kills", "--kind", "cpu best", "--every", "23", "--first", "4")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_two_commands_on_one_bundle() -> None:
    kinds = ("export, another export", "another export, validate", "validate, validate")
    words = [word for kind in kinds for word in ("--kind", kind)]
    done = _campaign("tests.hostile.pairs", *words, "--count", "2", "--seed", "3")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "6 pairs, 0 failed" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_compiling_is_gone_on_with() -> None:
    done = _campaign("tests.hostile.kills", "--kind", "compile", "--every", "9", "--first", "5")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("code", "err", "kind"),
    [
        (0, "", "accepted"),
        (1, "", "accepted"),
        (2, "note: x\nerror: a line\n", "refused"),
        (3, "error: a fault\n", "exit 3"),
        (139, "", "exit 139"),
        (2, "", "0 error lines"),
        (2, "error: a\nerror: b\n", "2 error lines"),
        (2, "error: a\nand more\n", "1 error lines"),
        (0, "error: a\n", "exit 0 with 1 error lines"),
        (1, "Traceback (most recent call last):\n", "a traceback"),
        (2, f"error: {'x' * 2000}\n", "a line of 2007 characters"),
    ],
)
def test_the_oracle_tells_each_kind_of_end(code: int, err: str, kind: str, tmp_path: Path) -> None:
    ended = subprocess.CompletedProcess([], code, "", err)
    with mock.patch("tests.hostile.sandbox.called", return_value=ended):
        outcome = Sandbox(tmp_path).judged(("check", "x"))
    assert kind == outcome.kind if kind in ("accepted", "refused") else outcome.kind == "failed" and kind in outcome.why


def test_the_oracle_sees_what_is_written_elsewhere(tmp_path: Path) -> None:
    sandbox, ended = Sandbox(tmp_path), subprocess.CompletedProcess([], 0, "", "")

    def writes(where: str) -> Any:
        return lambda *_: (tmp_path / where).write_text("x", encoding="utf-8") and ended

    (tmp_path / "out").mkdir()
    for where, kind in (("out/x", "accepted"), ("checkpoint", "failed"), ("x", "failed")):
        with mock.patch("tests.hostile.sandbox.called", side_effect=writes(where)):
            assert sandbox.judged(("check", "x")).kind == kind, where


def test_mutants_differ_and_come_again() -> None:
    text = b'{"a": [1, 2, {"b": null}]}'
    made = [damaged_bytes(text, Random(k)) for k in range(300)]
    assert len(set(made)) > 150 and made == [damaged_bytes(text, Random(k)) for k in range(300)]
    assert sum(mutant == text for mutant in made) < 30


@settings(max_examples=200, derandomize=True, database=None)
@given(damaged_json({"a": [1, {"b": None}], "c": "d"}))
def test_structures_stay_json(content: bytes) -> None:
    try:
        json.loads(content)
    except RecursionError:
        assert b"[" * 3000 in content


def test_every_place_of_a_document_is_one() -> None:
    assert places({"a": [1, {"b": 2}]}) == [(), ("a",), ("a", 0), ("a", 1), ("a", 1, "b")]
    # Floats by their bits: a bundle that was opened in this process has turned subnormal numbers off.
    distinct = {struct.pack("d", value) if isinstance(value, float) else repr(value) for value in ODD_VALUES}
    assert len(distinct) == len(ODD_VALUES)


def test_batches_share_out_every_mutant() -> None:
    jobs = batches(list(PARSERS), 10_000, 1)
    assert sum(job["count"] for job in jobs) == pytest.approx(10_000, rel=0.01)
    assert {job["parser"] for job in jobs} == {parser.name for parser in PARSERS}
    assert len({job["seed"] for job in jobs}) == len(jobs)
