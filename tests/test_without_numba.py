"""Whoever only runs bundles does without numba: the commands for that work, the others say what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT = "import sys; sys.modules['numba'] = None; from toolkit.cli.commands import main; main()"
NEEDED = "error: quantizing needs numba, which is not installed: pip install 'onnx-distill-toolkit[convert]'"


def _run(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, *words],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1"},
    )


@pytest.fixture(scope="module")
def bundle(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("without") / "bundle"
    words = ["export", "cpu", "--checkpoint", str(tiny_r1), "--precision", "fp32", "--no-validate", "--out", str(out)]
    done = _run(*words)
    assert done.returncode == 0, done.stderr  # unquantized graphs need no compiler either
    return out


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "{}", "--prompt", "Add 4 and 5.", "--max-new-tokens", "4"],
        ["bench", "{}", "--prompt-tokens", "4", "--new-tokens", "2", "--repeat", "1"],
        ["verify", "{}"],
        ["inspect", "{}"],
        ["check", "{}"],
        ["recipes"],
        ["export", "tiny-r1-cpu", "--dry-run"],
    ],
    ids=lambda words: words[0],
)
def test_what_runs_bundles_runs_without(bundle: Path, words: list[str]) -> None:
    done = _run(*[word.format(bundle) for word in words])
    assert done.returncode == 0 and done.stdout, done.stderr


def test_a_conversation_runs_without(bundle: Path) -> None:
    done = _run("chat", str(bundle), "--max-new-tokens", "4", stdin="Add 4 and 5.\n\n")
    assert done.returncode == 0, done.stderr


def test_an_export_says_what_to_install_before_it_writes(tmp_path: Path) -> None:
    done = _run("export", "tiny-r1-cpu", "--no-validate", "--out", str(tmp_path / "bundle"))
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == NEEDED
    assert list(tmp_path.iterdir()) == []
