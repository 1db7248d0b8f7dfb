"""What trained models are judged by: conversations of GSM8K's first test questions, none of which is calibrated on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from benchmarks.answering import Material
from toolkit.checkpoint.opened import Checkpoint
from toolkit.evaluate.tasks import Task
from toolkit.pipeline.text import LONGEST, find_text, token_sequences

QUESTIONS: Final = Path(__file__).parent / "data" / "gsm8k.jsonl"
_JUDGED_TOKENS: Final = 1000
_IMATRIX_TOKENS: Final = 4096
_CALIBRATED_ON: Final = slice(300, 400)


def judged_texts(folder: Path) -> tuple[Path, Path]:
    """Questions with their answers as conversations, written into `folder`: those that are judged, and those that may
    be calibrated on."""
    lines = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    paths = folder / "judged.jsonl", folder / "calibration.jsonl"
    for path, chosen in zip(paths, (lines[:12], lines[_CALIBRATED_ON]), strict=True):
        talks = [{"messages": [_turn("user", x["question"]), _turn("assistant", x["answer"])]} for x in chosen]
        path.write_text("".join(f"{json.dumps(talk)}\n" for talk in talks), encoding="utf-8")
    return paths


def judged_material(checkpoint: Checkpoint, text: Path, task: Task | None = None) -> Material:
    """The first thousand tokens of a text, the product's own calibration text for peers, and the task's questions."""
    sequences = token_sequences(checkpoint, text, _JUDGED_TOKENS, shortest=160)
    calibration_text = find_text("calibration", "cpu", "cpu", checkpoint)
    return Material(sequences, token_sequences(checkpoint, calibration_text, _IMATRIX_TOKENS, LONGEST), task)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
