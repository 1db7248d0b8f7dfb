"""Many exports from one file: which cells there are, what is kept, tried again and summed up, what a stop leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tests.command_line import ROOT, called
from toolkit.errors import RecipeError
from toolkit.matrix import story
from toolkit.matrix.cells import Ended, run_cell
from toolkit.matrix.planned import export_words, plan_cells
from toolkit.pipeline.place import held
from toolkit.recipe import read_matrix
from toolkit.target import TARGETS

EXAMPLES = ROOT / "docs" / "examples"
QUICK: dict[str, Any] = {"set": ["bits_per_weight=0"], "qualities": ["fast"], "validate": False}


def written(folder: Path, **keys: Any) -> Path:
    path = folder / "nightly.yaml"
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return path


def test_cells_are_models_times_targets_times_qualities_less_what_is_left_out(tmp_path: Path) -> None:
    models = ["tiny-r1", {"name": "mine", "checkpoint": "someone/mine", "revision": "abc"}]
    keys = {"models": models, "targets": ["cpu", "qnn"], "qualities": ["fast", "best"], "leave_out": ["mine-qnn*"]}
    settings = [{"match": "tiny-r1-qnn-*", "set": ["parts=2"]}]
    found = read_matrix(written(tmp_path, **keys, settings=settings, set=["context_length=256"]))
    assert [(cell.name, cell.recipe, cell.checkpoint, cell.revision, cell.quality) for cell in found.cells] == [
        ("tiny-r1-cpu-fast", "tiny-r1-cpu", None, None, "fast"),
        ("tiny-r1-cpu-best", "tiny-r1-cpu", None, None, "best"),
        ("tiny-r1-qnn-fast", "tiny-r1-qnn", None, None, "fast"),
        ("tiny-r1-qnn-best", "tiny-r1-qnn", None, None, "best"),
        ("mine-cpu-fast", "cpu", "someone/mine", "abc", "fast"),
        ("mine-cpu-best", "cpu", "someone/mine", "abc", "best"),
    ]
    assert found.cells[2].changes == ("context_length=256", "parts=2")
    assert found.cells[0].changes == ("context_length=256",)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "has no cell"),
        ({"models": ["tiny-r1"]}, "names models and no targets"),
        ({"models": ["tiny-r1"], "targets": ["cpx"]}, "no target 'cpx' (did you mean 'cpu'?)"),
        ({"models": ["tiny-r1"], "targets": ["cpu"], "qualities": ["bast"]}, "no quality 'bast'"),
        ({"models": ["tiny-r1", "tiny-r1"], "targets": ["cpu"]}, "two cells are called tiny-r1-cpu"),
        ({"models": [3], "targets": ["cpu"]}, "a model is 3"),
        ({"modles": ["tiny-r1"]}, "unknown key 'modles' (did you mean 'models'?)"),
        ({"recipes": "tiny-r1-cpu"}, "recipes is 'tiny-r1-cpu', expected a list"),
        ({"recipes": ["tiny-r1-cpu"], "retries": -1}, "retries is -1"),
        ({"recipes": ["tiny-r1-cpu"], "validate": {"tokens": "many"}}, "validate.tokens is 'many'"),
    ],
)
def test_what_is_no_matrix_is_one_line(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as problem:
        read_matrix(written(tmp_path, **keys))
    assert said in str(problem.value) and "\n" not in str(problem.value)


def test_the_dry_run_has_the_cost_and_the_command_of_each_cell_and_writes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, models=["tiny-r1"], targets=["cpu", "qnn"], validate={"tokens": 50, "speed": False})
    out = tmp_path / "out"
    done = called("matrix", str(path), "--dry-run", "--json", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["cell"] for row in rows] == ["tiny-r1-cpu", "tiny-r1-qnn"] and not out.exists()
    assert all(
        row["forecast_s"] == pytest.approx(sum(p["forecast_s"] for p in row["plan"]["forecast"])) for row in rows
    )
    assert rows[0]["command"] == f"toolkit export tiny-r1-cpu --out {out / 'tiny-r1-cpu'} --no-speed --tokens 50"
    lines = called("matrix", str(path), "--dry-run", "--out", str(out)).stdout.splitlines()
    assert lines[-1].startswith("2 cells, about ")


def test_a_second_run_converts_nothing_and_a_changed_cell_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = ["tiny-r1", {"name": "none", "checkpoint": str(tmp_path / "none")}]
    out, keys = tmp_path / "out", {"models": models, "targets": ["cpu"], "leave_out": [], **QUICK}
    first = story.run_matrix(read_matrix(written(tmp_path, **keys)), out)
    assert [(cell.state, cell.kept) for cell in first.cells] == [("made", False), ("broken", False)]
    assert not first.passed and "none" in (first.cells[1].error or "")
    assert first.cells[0].report and first.cells[0].report.recipe == "tiny-r1-cpu"
    page, junit = (out / "index.html").read_text(encoding="utf-8"), ElementTree.parse(out / "junit.xml").getroot()
    assert '<a href="tiny-r1-cpu-fast/report.html">' in page and "1 of 2" in page
    suites = {suite.get("name"): suite for suite in junit}
    assert suites["none-cpu-fast"].get("errors") == "1" and suites["tiny-r1-cpu-fast"].get("errors") == "0"
    error = suites["none-cpu-fast"].find("testcase/error")
    assert error is not None and error.get("message") == first.cells[1].error

    asked: list[list[str]] = []

    def unmade(words: list[str], *_: object) -> Ended:
        asked.append(words)
        return Ended(0, 1, 0.0)

    monkeypatch.setattr(story, "run_cell", unmade)
    again = story.run_matrix(read_matrix(tmp_path / "nightly.yaml"), out)
    assert again.cells[0].kept and again.cells[0].seconds == first.cells[0].seconds and asked == []
    changed = written(tmp_path, **{**keys, "set": ["bits_per_weight=0", "context_length=512"]})
    assert not story.run_matrix(read_matrix(changed), out).cells[0].kept
    assert len(asked) == 1 and "--force" in asked[0]
    # What another version of a package made is made anew too.
    asked.clear()
    monkeypatch.setattr("toolkit.bundle.manifest.package_versions", lambda: {"numpy": "0"})
    story.run_matrix(read_matrix(changed), out)
    assert len(asked) == 1


def test_two_matrices_into_one_folder_are_one_line(tmp_path: Path) -> None:
    path, out = written(tmp_path, recipes=["tiny-r1-cpu"]), tmp_path / "out"
    with held([out]):
        done = called("matrix", str(path), "--out", str(out))
    assert done.returncode == 2 and "by another process" in done.stderr and done.stderr.count("\n") == 1
    assert not (out / "index.html").exists()


def command_that(monkeypatch: pytest.MonkeyPatch, folder: Path, program: str) -> Path:
    """Lets cells run a program in place of the toolkit; it counts its runs in the file that is returned."""
    counting = folder / "runs"
    counting.write_text("", encoding="utf-8")
    head = f"import json, os, sys, time\nwith open({str(counting)!r}, 'a') as file:\n    file.write('x')\n"
    path = folder / "program.py"
    path.write_text(f"{head}runs = len(open({str(counting)!r}).read())\n{program}\n", encoding="utf-8")
    monkeypatch.setattr("toolkit.matrix.cells.python_module", lambda _: [sys.executable, str(path)])
    return counting


def failing(kind: str, code: int) -> str:
    return f"print(json.dumps({{'error': {{'kind': {kind!r}, 'message': 'no'}}}}))\nsys.exit({code})"


@pytest.mark.parametrize(
    ("program", "retries", "expected"),
    [
        ("sys.exit(0)", 2, (0, 1, None)),
        ("sys.exit(1)", 2, (1, 1, None)),
        (failing("MachineError", 2), 2, (2, 3, "no")),
        ("if runs < 2:\n    print('{}')\n    os._exit(9)\nsys.exit(0)", 2, (0, 2, None)),
        (failing("RecipeError", 2), 2, (2, 1, "no")),
        ("time.sleep(60)", 0, (None, 1, "not done within 1 s: raise timeout_s, or run again to go on")),
        ("os._exit(9)", 1, (9, 2, "its process left with exit code 9 without a word: see its log")),
    ],
)
def test_a_cell_is_tried_again_where_that_may_help(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    program: str,
    retries: int,
    expected: tuple[int | None, int, str | None],
) -> None:
    counting = command_that(monkeypatch, tmp_path, program)
    ended = run_cell(["export"], tmp_path / "log", retries, 1.0 if "sleep" in program else None)
    assert (ended.exit_code, ended.attempts, ended.error) == expected
    assert len(counting.read_text(encoding="utf-8")) == expected[1]


@pytest.mark.skipif(sys.platform == "win32", reason="a signal to one process alone is POSIX's")
def test_a_stop_leaves_finished_cells_and_the_next_run_goes_on(tmp_path: Path) -> None:
    path, out = written(tmp_path, models=["tiny-r1"], targets=["cpu", "cpu-split"], **QUICK), tmp_path / "out"
    command = [sys.executable, "-m", "toolkit", "matrix", str(path), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, start_new_session=True) as process:
        until = time.monotonic() + 240
        while not (out / "matrix.json").is_file() and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert b"error: interrupted; the same command goes on from here" in said
    assert "not run" in (out / "index.html").read_text(encoding="utf-8")
    again = story.run_matrix(read_matrix(path), out)
    assert again.passed and [cell.kept for cell in again.cells] == [True, False]


def test_the_nightly_example_is_every_target_of_both_models(tmp_path: Path) -> None:
    """Those of the model that is here are planned in full; its workflow's commands are ones that there are."""
    found = read_matrix(EXAMPLES / "nightly.yaml")
    assert [cell.name for cell in found.cells] == [f"{m}-{t}" for m in ("tiny-r1", "smollm2") for t in TARGETS]
    tiny = [cell for cell in found.cells if cell.recipe == cell.name]
    assert len(tiny) == len(TARGETS)
    only = replace(found, cells=tuple(tiny), workers="2")
    planned = plan_cells(only, tmp_path, exact=True)
    assert [entry.refusal for entry in planned] == [None] * len(tiny)
    words = export_words(only, planned[0], False)
    assert "--force" not in words and words[words.index("--workers") + 1] == "2"
    steps = yaml.safe_load((EXAMPLES / "nightly-workflow.yml").read_text(encoding="utf-8"))["jobs"]["bundles"]["steps"]
    asked = [line.split() for step in steps for line in step.get("run", "").splitlines() if " toolkit " in f" {line}"]
    options = {word for words in asked for word in words if word.startswith("--")}
    assert [words[:2] for words in asked] == [["toolkit", "matrix"]] * 2 + [["toolkit", "compare"]]
    assert options == {"--out", "--dry-run"}
    # What the cache keeps and the artifact takes is where the bundles go.
    kept = [line for step in steps for line in str(step.get("with", {}).get("path", "")).split()]
    assert {"build/nightly", "build/nightly/index.html", "build/nightly/junit.xml"} <= set(kept)
    assert all(words[words.index("--out") + 1] == "build/nightly" for words in asked if "--out" in words)
