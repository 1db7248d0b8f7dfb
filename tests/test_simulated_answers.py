"""Answers by drafts: whatever the draft, what comes out is the judge's own greedy answer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.compiler import needs_compiler
from tests.graphs import EIGHT_BITS, export_bundle
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.evaluate import simulated_loop
from toolkit.evaluate.answers import ask, bundle_answers, first_of, simulated_answers
from toolkit.evaluate.positions import Pipeline
from toolkit.evaluate.simulated_answers import drafted_answers, simulator_judge
from toolkit.evaluate.simulator import simulated_hidden
from toolkit.evaluate.tasks import read_task
from toolkit.recipe import load_recipe

VOCAB, STOP = 50, 7
# What a process makes of a denormal number after genai's loop in the simulator ran in it.
DENORMAL = """
import sys
import numpy as np
from toolkit.evaluate.simulated_loop import _continue
_continue({"bundle": sys.argv[1], "prompts": [[5]], "new_tokens": 1})
assert np.float32(1e-40) * np.float32(1) > 0, "lost"
"""


def _next(ids: list[int]) -> int:
    """A model of its own: any function of all tokens before."""
    return hash((len(ids), *ids[-3:])) % VOCAB


def _judge(sequences: Sequence[list[int]]) -> list[list[int]]:
    return [[_next(ids[: k + 1]) for k in range(len(ids))] for ids in sequences]


def _greedy(prompt: list[int], new_tokens: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < new_tokens and (not answer or answer[-1] != STOP):
        answer.append(_next(prompt + answer))
    return answer


@pytest.mark.parametrize("wrong", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("new_tokens", [1, 5, 40])
def test_the_answer_is_the_judges_whatever_the_draft(wrong: float, new_tokens: int) -> None:
    rng = np.random.default_rng(int(10 * wrong) + new_tokens)
    rounds = []

    def draft(prompts: Sequence[list[int]], count: int) -> list[list[int]]:
        rounds.append(len(prompts))
        made = []
        for prompt in prompts:
            answer: list[int] = []
            while len(answer) < count and (not answer or answer[-1] != STOP):
                right = _next(prompt + answer)
                answer.append(int(rng.integers(VOCAB)) if rng.random() < wrong else right)
            made.append(answer)
        return made

    prompts = [[int(i) for i in rng.integers(0, VOCAB, 1 + k)] for k in range(12)]
    expected = [_greedy(prompt, new_tokens) for prompt in prompts]
    assert drafted_answers(prompts, new_tokens, {STOP}, draft, _judge) == expected
    assert len(rounds) == 1 if wrong == 0 else len(rounds) <= new_tokens + 1


def test_a_context_without_room_ends_the_answer() -> None:
    def draft(prompts: Sequence[list[int]], count: int) -> list[list[int]]:
        return [[_next(prompt)] if len(prompt) < 5 else [] for prompt in prompts]

    (answer,) = drafted_answers([[1, 2]], 40, {STOP}, draft, _judge)
    assert answer == _greedy([1, 2], 3)


@pytest.fixture(scope="module")
def small(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short context, which the simulator takes less time for."""
    out = tmp_path_factory.mktemp("small") / "b"
    changes = [*EIGHT_BITS, "context_length=128", "window=32"]
    return export_bundle(load_recipe("tiny-r1-qnn", changes), open_checkpoint(tiny_r1), out)


def test_sequences_in_one_cache_do_not_see_each_other(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ORT's CPU kernels in the simulator's place every sequence has the hidden states it has alone."""
    from toolkit.evaluate import simulator

    pipeline = Pipeline(small, exact=True)
    rng = np.random.default_rng(0)
    sequences = [[int(i) for i in rng.integers(3, 1000, length)] for length in (40, 5, 70)]

    def on_cpu(bundle: Path, stages: dict[str, str], runs: list[simulator._Run], hidden: list[np.ndarray]) -> object:
        session = pipeline._sessions[stages["context"]]
        cache = {v.name: np.zeros(v.shape, np.float16) for v in session.get_inputs() if len(v.shape) == 4}
        made = []
        for array, run in zip(hidden, runs, strict=True):
            feeds = {"inputs_embeds": array, "past_seq_len": np.array([[run.last]], np.int32), **cache}
            feeds["total_seq_len"] = np.array([run.total], np.int32)
            out = dict(zip([v.name for v in session.get_outputs()], session.run(None, feeds), strict=True))
            cache = {name: out[name.replace("past_key_values", "present")] for name in cache}
            made.append(out["last_hidden_states"])
        return made

    monkeypatch.setattr(simulator, "_run_apart", on_cpu)
    together = simulated_hidden(small, pipeline, sequences)
    for ids, found in zip(sequences, together, strict=True):
        alone = np.concatenate([step.hidden[:, :kept] for step, kept in pipeline.stage_runs(ids)], axis=1)
        assert found.shape == (1, len(ids), 256) and np.array_equal(found, alone)


@needs_compiler
def test_answers_in_the_simulator_are_genais_own_there(small: Path, tiny_r1: Path) -> None:
    task = read_task(tiny_r1 / "arithmetic.jsonl", 3)
    asked = ask(small, task, 40)
    answers = simulated_answers(small, asked)
    on_cpu = bundle_answers(small, asked, on_cpu=True)
    # Eight bits: the simulator and the CPU answer alike.
    assert answers.tokens.tolist() == on_cpu.tokens.tolist() and answers.right.tolist() == on_cpu.right.tolist()
    (made,) = simulated_loop.simulated_continuations(small, [asked.ids[0]], 3)
    one = first_of(asked, 1)
    (drafted,) = drafted_answers(one.ids, 3, one.stop_ids, lambda p, n: [[0] * n for _ in p], simulator_judge(small))
    assert made == drafted


@needs_compiler
def test_genais_loop_leaves_the_simulator_its_denormal_numbers(small: Path) -> None:
    """The bundle asks the CPU to take them for zeros, which holds for a process: the simulator's float16 ones too."""
    done = subprocess.run([sys.executable, "-c", DENORMAL, str(small)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
