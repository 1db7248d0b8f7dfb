"""lm-evaluation-harness itself drives tiny-r1, installed into build/harness; its figures against the reference."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.graphs import export_bundle
from tests.own_python import python_with
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.recipe import load_recipe
from toolkit.reference.decoder import reference_logits
from toolkit.reference.greedy import greedy_continuations

ROOT = Path(__file__).parent.parent.parent
BOS, STOP_ID, QUESTIONS, SHORT = 767, 764, 40, 64
SUMS = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{{text}}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 300, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}{{{{think}}}}\\n</think>\\n"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}]
"""
# Our arithmetic beside lm_eval's own, on pairs and lengths at random, with the bundle's tokenizer.
ORACLE = """
import json, random, sys
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows
from toolkit.evaluate.harness import BundleLM
from toolkit.evaluate.likelihood import Likelihood
lm = BundleLM(sys.argv[1])
class Theirs:
    backend = "causal"
    tok_encode = staticmethod(lm._encode)
ours = Likelihood(None, lm._encode, 0, 9)
rng, pairs, windows = random.Random(0), 0, 0
words = ["Add", " 459", " and ", "\\n", "river", "s.", " ", "  ", "</think>", "1", "105", "é", "<｜User｜>"]
while pairs < 2000:
    one, two = ("".join(rng.choices(words, k=rng.randint(1, 5))) for _ in range(2))
    if one.strip():
        theirs = TemplateLM._encode_pair(Theirs, one, two)
        assert not theirs[1] or ours.parted(one, two) == theirs, (one, two)
        pairs += 1
for length in range(60):
    ids = list(range(length))
    assert list(ours.windows(ids)) == list(get_rolling_token_windows(ids, 0, 9, 1)), length
    windows += 1
print(json.dumps([pairs, windows]))
"""
# The lines of toolkit/evaluate/harness.py, with tasks of a folder.
FROM_PYTHON = """
import sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from toolkit.evaluate.harness import BundleLM
bundle, folder = sys.argv[1:]
print(simple_evaluate(BundleLM(bundle), tasks=["asked"], apply_chat_template=True,
    task_manager=TaskManager(include_path=folder, include_defaults=False))["results"]["asked"]["exact_match,none"])
"""


@pytest.fixture(scope="session")
def python() -> Path:
    """A Python that has the extra `harness`; made once and kept."""
    return python_with("harness", "-c", "constraints.txt", "-e", ".[harness]")


@pytest.fixture(scope="session")
def rows(test_questions: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Questions, each with four choices of one length: the answer, and others that differ from it in one character."""
    rng, made = np.random.default_rng(0), []
    for row in test_questions[:QUESTIONS]:
        answer, choices = row["answer"], [row["answer"]]
        alphabet = "0123456789" if answer.isdigit() else "abcdefghijklmnopqrstuvwxyz"
        while len(choices) < 4:
            k = int(rng.integers(len(answer)))
            other = answer[:k] + str(rng.choice(list(alphabet))) + answer[k + 1 :]
            choices += [other] * (other not in choices)
        label = int(rng.integers(4))
        choices[0], choices[label] = choices[label], choices[0]
        made.append({**row, "choices": choices, "label": label})
    return made


@pytest.fixture(scope="session")
def folder(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks as a user writes them: YAML beside JSON lines."""
    folder = tmp_path_factory.mktemp("harness")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = {
        "whole": SUMS.format(name="whole", file=data, text="prompt"),
        "asked": SUMS.format(name="asked", file=data, text="question"),
        "choices": CHOICES.format(file=data),
        "rolling": ROLLING.format(file=data),
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def bundles(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Unquantized, so that the checkpoint's reference is the oracle: one graph, a pipeline, and a short context."""
    folder, made = tmp_path_factory.mktemp("bundles"), {}
    for name, recipe, changes in (
        ("cpu", "tiny-r1-cpu", []),
        ("cpu-split", "tiny-r1-cpu-split", []),
        ("short", "tiny-r1-cpu", [f"context_length={SHORT}"]),
    ):
        made[name] = export_bundle(load_recipe(recipe, changes), open_checkpoint(tiny_r1), folder / name, "fp32")
    return made


def _run(python: Path, words: list[str | Path]) -> str:
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, *words], capture_output=True, text=True, encoding="utf-8", env=offline, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _evaluate(python: Path, bundle: Path, folder: Path, tasks: str, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(results by task, samples by task in the order of the rows) of `toolkit harness`."""
    words = ["--include_path", str(folder), "--tasks", tasks, "--output_path", str(out), "--log_samples"]
    _run(python, ["-m", "toolkit", "harness", bundle, *words])
    (results,) = out.rglob("results_*.json")
    samples = {}
    for name in tasks.split(","):
        (path,) = out.rglob(f"samples_{name}_*.jsonl")
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        samples[name] = sorted(found, key=lambda sample: sample["doc_id"])
    return json.loads(results.read_text(encoding="utf-8"))["results"], samples


def _log_probabilities(tiny_r1: Path, sequences: list[list[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """By sequence, of each id after its first: its log-probability, and whether it is the likeliest, in float64."""
    checkpoint = open_checkpoint(tiny_r1)
    made = []
    for ids, logits in zip(sequences, reference_logits(checkpoint.config, checkpoint.source, sequences), strict=True):
        rows, following = logits[:-1].astype(np.float64), np.array(ids[1:])
        picked = rows[np.arange(len(following)), following]
        made.append((picked - np.logaddexp.reduce(rows, axis=1), rows.argmax(axis=1) == following))
    return made


@pytest.mark.parametrize("name", ["cpu", "cpu-split"])
def test_likelihoods_and_answers_are_the_references(
    name: str,
    python: Path,
    bundles: dict[str, Path],
    folder: Path,
    rows: list[dict[str, Any]],
    tiny_r1: Path,
    tmp_path: Path,
) -> None:
    results, samples = _evaluate(python, bundles[name], folder, "whole,choices", tmp_path)
    tokenizer = Tokenizer.from_file(str(tiny_r1 / "tokenizer.json"))
    contexts = [tokenizer.encode(f"{row['prompt']}{row['think']}\n</think>").ids for row in rows]
    choices = [[tokenizer.encode("\n" + choice).ids for choice in row["choices"]] for row in rows]
    sequences = [context + ids for context, four in zip(contexts, choices, strict=True) for ids in four]
    expected, largest, greedy, right = _log_probabilities(tiny_r1, sequences), 0.0, 0, 0
    for k, (row, sample) in enumerate(zip(rows, samples["choices"], strict=True)):
        start = len(contexts[k]) - 1
        totals = []
        for (total, is_greedy), (log_p, likeliest) in zip(
            [response[0] for response in sample["resps"]], expected[4 * k : 4 * k + 4], strict=True
        ):
            totals.append(log_p[start:].sum())
            largest = max(largest, abs(float(total) - totals[-1]))
            assert is_greedy == str(bool(likeliest[start:].all()))
            greedy += is_greedy == "True"
        right += int(np.argmax(totals)) == row["label"]
    print(f"{name}: largest difference of {4 * len(rows)} log-likelihoods {largest:.2g}, {greedy} greedy")
    assert largest < 1e-3 and 0 < greedy <= len(rows)
    assert results["choices"]["acc,none"] == pytest.approx(right / len(rows)) and right > 0.6 * len(rows)

    checkpoint = open_checkpoint(tiny_r1)
    prompts = [tokenizer.encode(row["prompt"]).ids for row in rows]
    made = greedy_continuations(checkpoint.config, checkpoint.source, prompts, 300, {STOP_ID})
    # The thought is full of stop strings; they count after it alone.
    answers = [tokenizer.decode(ids).partition("</think>\n")[2].partition(".")[0] for ids in made]
    assert [sample["resps"][0][0] for sample in samples["whole"]] == answers
    accuracy = np.mean([answer == row["answer"] for answer, row in zip(answers, rows, strict=True)])
    assert results["whole"]["exact_match,none"] == pytest.approx(accuracy) and accuracy > 0.7
    print(f"{name}: multiple choice {right / len(rows):.1%}, exact match {accuracy:.1%}")


def test_a_text_longer_than_the_context_goes_by_windows(
    python: Path, bundles: dict[str, Path], folder: Path, rows: list[dict[str, Any]], tiny_r1: Path, tmp_path: Path
) -> None:
    _, samples = _evaluate(python, bundles["short"], folder, "rolling", tmp_path)
    tokenizer = Tokenizer.from_file(str(tiny_r1 / "tokenizer.json"))
    windows, owners, counts = list[list[int]](), list[int](), list[int]()
    for k, row in enumerate(rows):
        ids = [BOS, *tokenizer.encode(row["text"]).ids]
        for stop in [*range(SHORT + 1, len(ids), SHORT), len(ids)]:
            done = sum(count for count, owner in zip(counts, owners, strict=True) if owner == k)
            # The window with the most context: SHORT ids before its last.
            windows.append(ids[max(stop - SHORT - 1, 0) : stop])
            owners.append(k)
            counts.append(stop - 1 - done)
    totals = np.zeros(len(rows))
    for owner, count, (log_p, _) in zip(owners, counts, _log_probabilities(tiny_r1, windows), strict=True):
        totals[owner] += log_p[-count:].sum()
    assert len(windows) > len(rows)
    found = [float(sample["resps"][0][0]) for sample in samples["rolling"]]
    largest = np.abs(found - totals).max()
    print(f"rolling: {len(windows)} windows of {len(rows)} texts, largest difference {largest:.2g}")
    assert found == pytest.approx(totals.tolist(), abs=1e-3)


def test_the_chat_template_goes_around_a_question(
    python: Path, bundles: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    results, _ = _evaluate(python, bundles["cpu"], folder, "whole", tmp_path)
    printed = _run(python, ["-c", FROM_PYTHON, bundles["cpu"], folder])
    assert float(printed.strip().splitlines()[-1]) == results["whole"]["exact_match,none"]


def test_the_arithmetic_is_the_harnesses_own(python: Path, bundles: dict[str, Path]) -> None:
    assert json.loads(_run(python, ["-c", ORACLE, bundles["cpu"]]).splitlines()[-1]) == [2000, 60]


def test_a_request_that_cannot_be_met_is_one_line(python: Path, bundles: dict[str, Path], folder: Path) -> None:
    for bundle, options, message in (
        (bundles["cpu"], ["--gen_kwargs", "num_beams=4"], "generation option 'num_beams' is not supported"),
        (bundles["cpu"].parent / "gone", [], "cannot be read"),
    ):
        words = ["--include_path", str(folder), "--tasks", "whole", "--limit", "1", *options]
        command = [str(python), "-m", "toolkit", "harness", str(bundle), *words]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: "), done.stderr[-2000:]
        assert message in done.stderr.splitlines()[-1]
