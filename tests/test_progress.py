"""Progress of a long command: steps that know their phase, a line each off a terminal, a bar with an ETA on one."""

from __future__ import annotations

import io
import re
import sys

import pytest

from toolkit import progress
from toolkit.progress import FinishedStep, counted, progress_line


def test_a_step_is_its_name_and_knows_where_it_stands() -> None:
    seen: list[str] = []
    count = counted(seen.append, "pack", 3)
    for name in ("a", "b"):
        count(name)
    assert seen == ["a", "b"]
    assert [(s.phase, s.done, s.total) for s in seen if isinstance(s, FinishedStep)] == [("pack", 1, 3), ("pack", 2, 3)]


def test_lines_say_phase_count_time_and_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with progress_line() as told:
        calibrating, packing = counted(told, "calibrate", 4), counted(told, "pack")
        now[0] += 10
        calibrating("calibrated layer 0")
        now[0] += 30
        calibrating("calibrated layer 1")
        for tensor in ("q_proj", "k_proj"):
            packing(f"model.layers.0.self_attn.{tensor}.weight")
        told("speed")
    assert capsys.readouterr().err.splitlines() == [
        "calibrate 1 of 4, 10 s, about 30 s left: calibrated layer 0",
        "calibrate 2 of 4, 40 s, about 40 s left: calibrated layer 1",
        "pack, 0 s: model.layers.0",
        "speed",
    ]


def test_a_terminal_gets_a_bar_with_the_phase_and_an_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_line() as told:
        count = counted(told, "calibrate", 4)
        for layer in range(3):
            count(f"calibrated layer {layer}")
        counted(told, "pack", 9)("model.embed_tokens.weight")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(r"pack .*1/9 .*\d:\d\d:\d\d .*model\.embed_tokens\.weight", shown)
