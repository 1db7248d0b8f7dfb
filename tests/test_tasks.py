"""Tasks: files as they are published and as they are broken, what is asked, and the figures of what is answered."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.command_line import called
from tests.exports import Exports
from tests.graphs import export_bundle
from tests.gsm8k import GSM8K
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.errors import BundleError, RecipeError
from toolkit.evaluate import answers as answers_module
from toolkit.evaluate.answers import Answers, ask, bundle_answers, compared, reference_answers
from toolkit.evaluate.session import continuations
from toolkit.evaluate.tasks import read_task
from toolkit.recipe import load_recipe
from toolkit.reference.greedy import greedy_continuations

LIMIT = 40
STOP_ID = 764


@pytest.fixture(scope="module")
def bundle(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that is validated here."""
    return exports.copy(tmp_path_factory.mktemp("tasks") / "b", "cpu")


def _write(path: Path, lines: list[Any]) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
    return path


def test_published_files_are_read_as_they_stand(tmp_path: Path) -> None:
    lines = [
        {"question": "How many?", "answer": GSM8K},
        {"problem": "What?", "level": "Level 5", "type": "Algebra", "solution": "So \\boxed{\\frac{1}{2}}."},
        {"problem": "What?", "solution": "So $\\boxed{\\frac{1}{2}}$.", "answer": "\\frac{1}{2}"},
        {"question": "Spell river.", "prompt": "<｜User｜>Spell river.", "answer": "revir"},
        "",
        {"question": "Which?\u2028A, B", "answer": "B", "checker": "choice"},
        {"question": "How many?", "answer": 7, "checker": "number"},
    ]
    path = _write(tmp_path / "own.jsonl", lines)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # as editors on Windows leave it
    task = read_task(path)
    assert [(q.line, q.plain, q.checker) for q in task.questions] == [
        (1, True, "number"),
        (2, True, "boxed"),
        (3, True, "boxed"),
        (4, False, "exact"),
        (6, True, "choice"),
        (7, True, "number"),
    ]
    assert task.name == "own" and task.questions[3].text == "<｜User｜>Spell river."
    assert [q.is_right("\\boxed{18} or \\boxed{\\frac12}") for q in task.questions[:3]] == [False, True, True]
    assert task.questions[0].is_right("$18") and not task.questions[0].is_right(None)
    assert task.questions[4].is_right("The answer is B.") and task.questions[5].is_right("7.0")
    assert read_task(path, 2).questions == task.questions[:2]


GOOD = {"question": "1 + 1?", "answer": "2"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([""], "is empty: expected JSON lines"),
        ([GOOD, "{'question': 1}"], "line 2 is not JSON"),
        ([GOOD, "", '{"question": "cut'], "line 3 is not JSON"),
        ([["1 + 1?", "2"]], "line 1 holds a list, expected an object"),
        ([{"question": "1 + 1?"}], "line 1 has question: expected a prompt or question, and an answer"),
        ([{"text": "1 + 1?", "answer": "2"}], "line 1 has text, answer: expected a prompt or question"),
        ([{"question": "1 + 1?", "answer": ""}], "line 1 has question, answer: expected"),
        ([{"question": "1 + 1?", "answer": True}], "line 1 has question, answer: expected"),
        ([{**GOOD, "checker": "nummer"}], "checker 'nummer' is unknown (did you mean 'number'?), expected exact, "),
        ([{**GOOD, "checker": ["number"]}], "checker ['number'] is unknown"),
        ([{**GOOD, "checker": "choice"}], "checker 'choice' finds nothing to compare with in the answer '2'"),
        ([{**GOOD, "answer": "two", "checker": "number"}], "checker 'number' finds nothing to compare with"),
    ],
)
def test_a_file_that_is_no_task_names_its_line(lines: list[Any], message: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "own.jsonl", lines)
    with pytest.raises(RecipeError) as refused:
        read_task(path)
    assert message in str(refused.value) and str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"task 'gone' has no questions: there is no file .*gone\.jsonl"):
        read_task(tmp_path / "gone.jsonl")
    (tmp_path / "own.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not text in UTF-8"):
        read_task(tmp_path / "own.jsonl")


def test_a_plain_question_is_asked_as_its_whole_prompt(
    bundle: Path, test_questions: list[dict[str, str]], tmp_path: Path
) -> None:
    # The checkpoint's own file has both, so one is the other's oracle.
    rows = test_questions[:20]
    plain = [{"question": row["question"], "answer": row["answer"]} for row in rows]
    asked = ask(bundle, read_task(_write(tmp_path / "own.jsonl", plain)), LIMIT)
    assert list(asked.texts) == [row["prompt"] for row in rows]
    whole = ask(bundle, read_task(_write(tmp_path / "own.jsonl", rows)), LIMIT)
    assert asked.ids == whole.ids and asked.stop_ids == {STOP_ID}


def test_a_question_needs_a_chat_template(bundle: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(bundle, bare)
    settings = json.loads((bare / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["chat_template"]
    (bare / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    task = read_task(_write(tmp_path / "own.jsonl", [GOOD]))
    with pytest.raises(BundleError, match="cannot apply the chat template of"):
        ask(bare, task, LIMIT)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match="to ask questions with: leave them out"):
        ask(bare, task, LIMIT)


def test_figures_are_those_of_the_textbook() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.random(200) < 0.7, rng.random(200) < 0.8
    tokens, cut = rng.integers(1, 300, 200), rng.random(200) < 0.1
    one, other = Answers(ours, tokens, cut), Answers(theirs, tokens, cut)
    assert vars(one.figures()) == pytest.approx(
        {
            "accuracy": ours.mean(),
            "accuracy_se": ours.std(ddof=1) / math.sqrt(200),
            "mean_answer_tokens": tokens.mean(),
            "truncated": cut.mean(),
        }
    )
    drops = theirs.astype(int) - ours.astype(int)
    assert vars(compared(one, other)) == pytest.approx(
        {
            "right_to_wrong": (drops == 1).sum(),
            "wrong_to_right": (drops == -1).sum(),
            "accuracy_drop_se": drops.std(ddof=1) / math.sqrt(200),
        }
    )
    single = Answers(ours[:1], tokens[:1], cut[:1])
    assert single.figures().accuracy_se is None and compared(single, single).accuracy_drop_se is None


def test_own_tasks_are_reported_with_length_and_truncation(
    bundle: Path, tiny_r1: Path, test_questions: list[dict[str, str]], tmp_path: Path
) -> None:
    rows = test_questions[:20]
    lines = [
        {"question": row["question"], "answer": f"{row['think']}\n#### {row['answer']}"}
        for row in rows
        if row["answer"].isdigit()
    ]
    path = _write(tmp_path / "sums.jsonl", lines)
    words = ["--task", str(path), "--no-tasks", "--no-speed", "--tokens", "64", "--max-new-tokens", str(LIMIT)]
    done = called("validate", str(bundle), *words, "--json")
    report = json.loads(done.stdout)
    (row,) = report["tasks"]
    # Counted anew from the tokens, by the answer's digits alone.
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    kept = [row for row in rows if row["answer"].isdigit()]
    made = continuations(bundle, [tokenizer.encode(row["prompt"]).ids for row in kept], LIMIT)
    texts = [tokenizer.decode(ids).partition("</think>\n") for ids in made]
    right = [end != "" and text == question["answer"] for (_, end, text), question in zip(texts, kept, strict=True)]
    ended = [ids[-1] == STOP_ID for ids in made]
    assert {True, False} == set(ended) and 0 < sum(right) < len(right)
    assert row["name"] == "sums" and row["examples"] == len(kept) and row["max_new_tokens"] == LIMIT
    assert row["accuracy"] == pytest.approx(np.mean(right)) and row["truncated"] == pytest.approx(1 - np.mean(ended))
    lengths = [len(ids) - end for ids, end in zip(made, ended, strict=True)]
    assert row["mean_answer_tokens"] == pytest.approx(np.mean(lengths))
    assert row["reference_truncated"] == pytest.approx(row["truncated"], abs=0.1)
    assert {"accuracy_se", "reference_accuracy_se", "accuracy_drop_se", "reference_mean_answer_tokens"} <= row.keys()
    assert report["baseline"]["tasks"][0].keys() >= {"mean_answer_tokens", "truncated", "accuracy_se"}
    assert f"of {LIMIT} tokens" in (bundle / "report.html").read_text(encoding="utf-8")
    assert done.returncode in (0, 1) and "tasks" not in [entry["name"] for entry in report["not_measured"]]


def test_requests_for_tasks_that_cannot_be_asked(bundle: Path, tmp_path: Path) -> None:
    long = {"question": "Add 4 and 5. " * 300, "answer": "9"}
    cases = [
        (tmp_path / "gone.jsonl", "there is no file"),
        (_write(tmp_path / "long.jsonl", [GOOD, long]), "task long, line 2: the prompt has"),
        (_write(tmp_path / "arithmetic.jsonl", [GOOD]), "two tasks are called 'arithmetic'"),
    ]
    for path, message in cases:
        done = called("validate", str(bundle), "--task", str(path))
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: "), done.stderr
        assert message in done.stderr.splitlines()[-1]
    words = ["--task", str(tmp_path / "gone.jsonl"), "--out", str(tmp_path / "out")]
    assert called("export", "tiny-r1-cpu", *words).returncode == 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["cpu", "cpu-split"])
def test_the_contexts_end_cuts_bundle_and_reference_alike(
    target: str, tiny_r1: Path, test_questions: list[dict[str, str]], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    window = ["window=16"] if target == "cpu-split" else []
    recipe = load_recipe(f"tiny-r1-{target}", ["context_length=64", *window])
    bundle = export_bundle(recipe, checkpoint, tmp_path / "b", "fp32")
    asked = ask(bundle, read_task(_write(tmp_path / "own.jsonl", list(test_questions[:12]))), 300)
    # A pipeline's prompt takes up whole windows.
    taken = [len(ids) if target == "cpu" else -(-len(ids) // 16) * 16 for ids in asked.ids]
    assert list(asked.rooms) == [64 - tokens for tokens in taken]
    ours, theirs = bundle_answers(bundle, asked), reference_answers(checkpoint.config, checkpoint.source, asked)
    assert ours.tokens.tolist() == theirs.tokens.tolist() and ours.truncated.tolist() == theirs.truncated.tolist()
    assert {True, False} == set(ours.truncated.tolist()) and ours.right.tolist() == theirs.right.tolist()
    assert [t for t, cut in zip(ours.tokens, ours.truncated, strict=True) if cut] == [
        room for room, cut in zip(asked.rooms, ours.truncated, strict=True) if cut
    ]


def test_groups_of_the_reference_change_nothing(
    bundle: Path, tiny_r1: Path, test_questions: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    asked = ask(bundle, read_task(_write(tmp_path / "own.jsonl", list(test_questions[:7]))), LIMIT)
    whole = reference_answers(checkpoint.config, checkpoint.source, asked)
    monkeypatch.setattr(answers_module, "_CACHE_BYTES", 700_000)
    seen: list[int] = []

    def counted(config: Any, source: Any, prompts: list[list[int]], *rest: Any) -> list[list[int]]:
        seen.append(len(prompts))
        return greedy_continuations(config, source, prompts, *rest)

    monkeypatch.setattr(answers_module, "greedy_continuations", counted)
    grouped = reference_answers(checkpoint.config, checkpoint.source, asked)
    assert len(seen) > 1 and sum(seen) == 7
    assert grouped.tokens.tolist() == whole.tokens.tolist() and grouped.right.tolist() == whole.right.tolist()
