"""The nightly workflow of the docs at toy size: its own shell steps, one night after the other, on one cell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from tests.command_line import ROOT

EXAMPLES = ROOT / "docs" / "examples"


def night(folder: Path) -> list[tuple[int, str]]:
    """The exit code and the output of each of the workflow's steps that run the toolkit or the shell alone."""
    steps = yaml.safe_load((EXAMPLES / "nightly-workflow.yml").read_text(encoding="utf-8"))["jobs"]["bundles"]["steps"]
    scripts = [step["run"] for step in steps if "run" in step and not step["run"].startswith("pip ")]
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    made = []
    for script in scripts:
        # As GitHub runs them.
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
        )
        made.append((done.returncode, done.stdout + done.stderr))
    return made


@pytest.mark.skipif(sys.platform == "win32", reason="the workflow is for a Linux runner")
def test_a_second_night_keeps_what_stands_and_a_worse_bundle_fails_the_comparison(tmp_path: Path) -> None:
    command = tmp_path / "bin" / "toolkit"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m toolkit "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    matrix = yaml.safe_load((EXAMPLES / "nightly.yaml").read_text(encoding="utf-8"))
    toy = {"models": matrix["models"][:1], "targets": matrix["targets"][:1], "qualities": ["fast"]}
    toy |= {"validate": {"tokens": 100, "examples": 2, "max_new_tokens": 4, "speed": False, "baseline": False}}
    toy |= {"set": ["validate.mean_kld=9", "validate.top1_agreement=0", "validate.accuracy_drop=1"]}
    (tmp_path / "nightly.yaml").write_text(yaml.safe_dump({**matrix, **toy}), encoding="utf-8")
    first = night(tmp_path)
    assert [code for code, _ in first] == [0, 0, 0, 0], first
    second = night(tmp_path)
    assert [code for code, _ in second] == [0, 0, 0, 0], second
    assert "kept" in second[2][1] and "mean_kld" in second[3][1]
    out = tmp_path / "build" / "nightly"
    suites = ElementTree.parse(out / "junit.xml").getroot()
    assert [suite.get("name") for suite in suites] == ["tiny-r1-cpu-fast"] and (out / "index.html").is_file()
    # A report of yesterday that was better makes the comparison fail, and says by what.
    report = tmp_path / "build" / "yesterday" / "tiny-r1-cpu-fast" / "report.json"
    content = json.loads(report.read_text(encoding="utf-8"))
    content["parity"]["mean_kld"] /= 2
    report.write_text(json.dumps(content), encoding="utf-8")
    steps = yaml.safe_load((EXAMPLES / "nightly-workflow.yml").read_text(encoding="utf-8"))["jobs"]["bundles"]["steps"]
    (compares,) = [step["run"] for step in steps if "toolkit compare" in step.get("run", "")]
    environment = {**os.environ, "PATH": os.pathsep.join([str(command.parent), os.environ["PATH"]])}
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", compares],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "REGRESSION:" in done.stdout + done.stderr
