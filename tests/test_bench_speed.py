"""What `benchmarks.speed` and `benchmarks.speculation` make of what programs say: turns, ratios, a file as good."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import speed
from benchmarks.peers import llama_cpp, llama_speculation
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.llama_speculation import LlamaWay
from benchmarks.peers.rows import Row
from benchmarks.peers.tool import PeerError
from benchmarks.real import Judged
from benchmarks.speed import Turn
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.report.sections import Divergence, Histogram


def row(name: str, bits: float, kld: float | None) -> Row:
    divergence = Divergence(0, kld or 0, 0, 0, 0, 1, 1, Histogram((), ()))
    return Row(name, bits, divergence, None if kld is None else divergence, 0, 0, "")


def turn(file: str, prefill: float, decode: float, round: int = 0, others: float | None = 0.0) -> Turn:
    return Turn(file, 2, round, prefill, decode, others)


def test_equal_is_the_cheapest_file_that_is_no_worse() -> None:
    files = [row("q4", 4.5, 0.09), row("q6", 6.6, 0.01), row("q5", 5.5, 0.05), row("not run", 4.0, None)]
    assert speed.equal(row("ours", 4.8, 0.06), files).name == "q5"
    assert speed.equal(row("ours", 4.8, 0.05), files).name == "q5"
    assert speed.equal(row("ours", 4.8, 0.005), files).name == "q6", "none is as good: the best there is"


def test_ratios_are_of_turns_of_one_round() -> None:
    taken = [turn("a", 10, 4), turn("b", 5, 2), turn("b", 40, 8, 1), turn("a", 20, 4, 1), turn("a", 7, 7, 2)]
    found = speed.ratio(taken, "a", "b", 2)
    assert found.prefill == (2.0, 0.5) and found.decode == (2.0, 0.5)
    assert speed.ratio(taken, "a", "b", 1).prefill == ()


@pytest.mark.parametrize("prefill, decode, reached", [(1.3, 1.15, True), (1.29, 2, False), (2, 1.14, False)])
def test_both_aims_are_wanted(prefill: float, decode: float, reached: bool) -> None:
    assert speed.Ratio((prefill,), (decode,)).reaches() is reached


def test_every_other_round_goes_backwards_and_disturbed_turns_are_taken_again() -> None:
    others, order = iter([0.0, 0.5, 0.3, 0.0, 0.9, 0.7, 0.8, 0.0]), list[str]()

    def run(file: str, threads: int) -> Turn:
        order.append(file)
        return dataclasses.replace(turn(file, 1, 1, others=next(others)), threads=threads)

    taken = list(speed.turns(["a", "b"], [2], 2, run))
    assert "".join(order) == "abbbbbba"
    assert [(each.file, each.round, each.others) for each in taken] == [
        ("a", 0, 0.0),
        ("b", 0, 0.0),
        ("b", 1, 0.7),
        ("a", 1, 0.0),
    ]
    assert [each.is_disturbed() for each in taken] == [False, False, True, False]


def test_tables_mark_disturbed_turns_and_judge_the_equal_file_alone() -> None:
    rows = [row("ours", 4.8, 0.06), row("llama.cpp q4", 4.5, 0.09), row("llama.cpp q5", 5.5, 0.05)]
    taken = [turn("ours", 130, 23), turn("llama.cpp q4", 100, 30, others=2.0), turn("llama.cpp q5", 100, 20)]
    lines = speed.told(rows, taken).splitlines()
    assert lines[2:5] == [
        "| ours | 4.80 | 0.0600 | 130, 23.0 |",
        "| llama.cpp q4 | 4.50 | 0.0900 | ~100, 30.0 |",
        "| llama.cpp q5 | 5.50 | 0.0500 | 100, 20.0 |",
    ]
    assert lines[8] == "| ours / llama.cpp q4 | 0.67 | 2 | 1.30 (1.30 to 1.30) | 0.77 (0.77 to 0.77) |  |"
    assert lines[9] == "| ours / llama.cpp q5 | 1.20 | 2 | 1.30 (1.30 to 1.30) | 1.15 (1.15 to 1.15) | reached |"


def test_bundles_and_files_take_turns() -> None:
    assert speed._in_turns(["best", "llama.cpp a", "llama.cpp b", "fast", "llama.cpp c"]) == [
        "best",
        "llama.cpp a",
        "fast",
        "llama.cpp b",
        "llama.cpp c",
    ]


def test_what_this_process_and_its_children_took_is_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        speed.psutil, "cpu_times", lambda: SimpleNamespace(user=100.0, system=20.0, nice=3.0, idle=900.0)
    )
    told = SimpleNamespace(user=1.0, system=0.5, children_user=60.0, children_system=10.0, elapsed=5000.0)
    monkeypatch.setattr(speed.os, "times", lambda: told)
    assert speed._others_s() == 51.5


def test_rows_and_models_that_are_not_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], stories260k: Path
) -> None:
    monkeypatch.setattr(speed, "FOLDER", tmp_path)
    monkeypatch.setattr(Judged, "checkpoint", lambda self, folder: open_checkpoint(stories260k))
    (tmp_path / "smollm2-135m").mkdir()
    for words, told in (
        (["smollm2-135m", "--files", "balanced;llama.cpp q3"], "error: no row 'llama.cpp q3', expected some of fast, "),
        (["nobody"], "error: no model 'nobody', expected some of smollm2-135m, "),
    ):
        monkeypatch.setattr(speed.sys, "argv", ["speed", *words])
        assert speed.main() == 2
        said = capsys.readouterr().err
        assert said.startswith(told) and said.count("\n") == 1


class Said:
    """Stands for `subprocess.run`: keeps what was asked for, and answers with `says`."""

    def __init__(self, says: str, code: int = 0) -> None:
        self.says, self.code = says, code
        self.asked: list[list[str]] = []

    def __call__(self, command: list[str], **given: object) -> SimpleNamespace:
        self.asked.append(command)
        return SimpleNamespace(returncode=self.code, stdout=self.says, stderr="")


TOOLS = LlamaCpp(*(Path(name) for name in ("quantize", "logits", "bench", "completion", "speculative")))


def test_llama_benchs_medians_and_its_decoding_behind_the_prompt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = Said(json.dumps([{"n_prompt": 128, "avg_ts": 99.0, "samples_ts": [30.0, 10.0, 20.0]}]))
    monkeypatch.setattr(llama_cpp.subprocess, "run", run)
    assert llama_cpp.speed(TOOLS, tmp_path / "a.gguf", 128, 64, repeat=5, threads=7) == (20.0, 20.0)
    prompt, after = (" ".join(command) for command in run.asked)
    assert "-t 7 -r 5 -p 128 -n 0 " in prompt and "-t 7 -r 5 -p 0 -n 64 -d 128 " in after
    monkeypatch.setattr(llama_cpp.subprocess, "run", Said("", code=1))
    with pytest.raises(PeerError, match="exit code 1"):
        llama_cpp.speed(TOOLS, tmp_path / "a.gguf", 128, 64)


COMPLETED = """
common_perf_print: prompt eval time =     100.00 ms /    10 tokens (   10.00 ms per token,   100.00 tokens per second)
common_perf_print:        eval time =    4000.00 ms /    80 runs   (   50.00 ms per token,    20.00 tokens per second)
"""
SPECULATED = """
encoded   10 tokens in    0.500 seconds, speed:   20.000 t/s
decoded   81 tokens in    2.025 seconds, speed:   40.000 t/s

n_draft   = 4
n_predict = 81
n_drafted = 80
n_accept  = 54
accept    = 67.500%
common_perf_print: prompt eval time =     100.00 ms /    10 tokens (   10.00 ms per token,   100.00 tokens per second)
"""


def test_what_llamas_programs_say_of_speculation(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, drafted = LlamaWay(TOOLS, Path("m.gguf")), LlamaWay(TOOLS, Path("m.gguf"), Path("d.gguf"), 4)
    for way, says in ((plain, COMPLETED), (drafted, SPECULATED)):
        run = Said(says)
        monkeypatch.setattr(llama_speculation.subprocess, "run", run)
        for text in ("one", "two"):
            way.continue_text(text, 81)
        assert [command[4] for command in run.asked] == ["one", "two"]
        assert ("-md" in run.asked[0]) is (way is drafted)
    assert plain.cells(plain) == ("llama.cpp, m.gguf", "", "", "1.00", "20.0", "1.00", "", 160)
    # 81 tokens of which 54 were guessed rightly: 27 runs.
    assert drafted.cells(plain) == ("llama.cpp, draft d.gguf", 4, "68%", "3.00", "40.0", "2.00", "", 162)


@pytest.mark.parametrize("says, code, told", [("nothing", 0, "said nothing like"), ("boom", 3, "failed with 3")])
def test_a_program_that_says_nothing_known_is_an_error(
    monkeypatch: pytest.MonkeyPatch, says: str, code: int, told: str
) -> None:
    monkeypatch.setattr(llama_speculation.subprocess, "run", Said(says, code))
    with pytest.raises(PeerError, match=told):
        LlamaWay(TOOLS, Path("m.gguf")).continue_text("one", 8)
