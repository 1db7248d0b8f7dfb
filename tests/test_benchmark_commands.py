"""What benchmarks run of the toolkit's own command line, and what is said where it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.command_line import run_toolkit
from toolkit.errors import ToolkitError


def test_a_command_that_fails_is_its_own_line(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError) as failed:
        run_toolkit(["inspect", str(tmp_path / "nothing")])
    said = str(failed.value)
    assert str(tmp_path / "nothing") in said and "\n" not in said and not said.startswith("error:")


def test_what_it_prints_comes_back_and_paths_are_taken_from_here(
    tiny_r1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not from the source tree."""
    monkeypatch.chdir(tiny_r1.parent)
    assert json.loads(run_toolkit(["inspect", tiny_r1.name, "--json"]))
