"""Questions answered side by side through a bundle's graph: what onnxruntime-genai answers, one after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.answering import Material, asked_of, fresh_questions, graph_answers
from benchmarks.peers.rows import Row
from benchmarks.table import table
from tests.conftest import ROOT
from tests.exports import Exports
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.evaluate.answers import judged
from toolkit.evaluate.parity import Comparison
from toolkit.evaluate.session import continuations
from toolkit.evaluate.tasks import Question, Task


def test_side_by_side_is_one_by_one(exports: Exports, tiny_r1: Path) -> None:
    # More questions than sequences, of several lengths: some begin where others have ended.
    task = fresh_questions(ROOT / "models" / "tiny-r1" / "generate.py", 20, seed=5)
    asked = asked_of(open_checkpoint(tiny_r1), task)
    assert len({len(ids) for ids in asked.ids}) > 5
    asked = replace(asked, rooms=(60,) * 20, new_tokens=60)
    bundle = exports("cpu")
    made = graph_answers(bundle, asked)
    assert made == continuations(bundle, list(asked.ids), 60)
    assert 0 < judged(asked, made).figures().truncated < 1


def test_plain_questions_stand_in_the_checkpoints_template(tiny_r1: Path) -> None:
    question = Question(1, "1 + 1?", True, "2", "exact")
    asked = asked_of(open_checkpoint(tiny_r1), Task("plain", (question,)))
    assert asked.texts[0].startswith("<｜begin▁of▁sentence｜><｜User｜>1 + 1?<｜Assistant｜>")
    assert asked.tokenizer.decode(asked.ids[0], skip_special_tokens=False) == asked.texts[0]


def test_the_table_says_what_was_not_measured_and_when_times_say_little() -> None:
    logits = np.random.default_rng(0).standard_normal((4, 9)).astype(np.float32)
    comparison = Comparison()
    comparison.add(logits, logits, [1, 2, 3, 4])
    row = Row("ours", 4.5, comparison.figures(), None, 12.0, 1 << 30, "as it is", load=7.0)
    text = table(Material([[1, 2, 3, 4]], []), [row], {"theirs": "no compiler"}, None)
    assert "| ours | 4.50 | 0 | - |" in text and "| - | - | - | 12 | 1024 |" in text
    assert "load of 7.0" in text and "- theirs: left out: no compiler" in text
