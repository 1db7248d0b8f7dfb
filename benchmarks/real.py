"""One table a trained model: this toolkit's qualities and sizes beside llama.cpp and onnxruntime-genai's builder.

    python -m benchmarks.real [MODEL …] [--only WORD;WORD] [--again WORD;WORD] [--no-questions]

Judged on GSM8K (benchmarks/data/gsm8k.jsonl, its first 400 test questions): KLD on conversations of the first of them,
greedy answers to as many as the model's row says, none of which is calibrated on. Calibration is the product's own
default, and once conversations of the last hundred. The checkpoint is what the file dequantizes to, in float16: its
weights stand on that file's grid, which flatters formats of the same blocks (llama.cpp's Q4_K_M, Q5_K_M).

A row that an earlier run made is kept, in build/bench-real/MODEL/rows.json, so that what was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.answering import Material, asked_of
from benchmarks.candidates import ROOT, Candidate, own_row, rule
from benchmarks.dequantized import dequantized_folder
from benchmarks.models import CODER_05B, CODER_15B, SMOLLM2, RealModel, fetch
from benchmarks.peers.rows import Bench, Row, peer_rows
from benchmarks.scatter import write_scatter
from benchmarks.table import table
from toolkit.errors import ToolkitError
from toolkit.evaluate.answers import reference_answers
from toolkit.evaluate.tasks import Task, read_task
from toolkit.files import replacing
from toolkit.pipeline.text import LONGEST, find_text, token_sequences
from toolkit.progress import progress_line
from toolkit.report.sections import Answered
from toolkit.typed_json import from_json, to_json

QUESTIONS: Final = Path(__file__).parent / "data" / "gsm8k.jsonl"
FOLDER: Final = ROOT / "build" / "bench-real"
_JUDGED_TOKENS: Final = 1000
_IMATRIX_TOKENS: Final = 4096
_CALIBRATED_ON: Final = slice(300, 400)


@dataclass(frozen=True)
class Judged:
    """A model, and how many questions it answers: enough for a standard error that tells files apart, and no more,
    since every answer is hundreds of passes."""

    model: RealModel
    questions: int


MODELS: Final = {
    "smollm2-135m": Judged(SMOLLM2, 0),
    "coder-0.5b": Judged(CODER_05B, 300),
    "coder-1.5b": Judged(CODER_15B, 150),
}
_LLAMA_TYPES: Final = ("q4_0", "iq4_xs+imatrix", "q4_k_m", "q4_k_m+imatrix", "q5_k_m")
PEERS: Final = (*(f"llama.cpp {kind}" for kind in _LLAMA_TYPES), "genai default", "genai k_quant_mixed")


@dataclass(frozen=True)
class Rows:
    """What is measured of a model so far."""

    checkpoint: Answered | None = None
    rows: tuple[Row, ...] = ()


def candidates(hidden_size: int, other_text: Path) -> Iterator[Candidate]:
    """Yields the target's own rules at every quality, then other sizes. `other_text` is text of the judged kind."""
    yield Candidate("fast", {"quality": "fast"})
    yield Candidate("balanced", {"quality": "balanced"})
    yield Candidate("best", {"quality": "best"})
    yield Candidate("balanced, budget 4.9", {"quality": "balanced", "bits_per_weight": 4.9})
    yield Candidate("best, budget 4.9", {"quality": "best", "bits_per_weight": 4.9})
    yield Candidate("best, budget 5.3", {"quality": "best", "bits_per_weight": 5.3})
    yield Candidate("rtn 32 symmetric", {"quantize": [rule(32, "rtn", symmetric=True)], "rotate": False})
    for block_size in (size for size in (64, 128) if hidden_size % size == 0):
        yield Candidate(f"balanced, blocks of {block_size}", {"quantize": [rule(block_size)], "quality": "balanced"})
    yield Candidate("balanced, calibrated on GSM8K", {"quality": "balanced", "calibration": str(other_text)})


class Table:
    """The rows of one model, kept as they come."""

    def __init__(self, name: str, again: list[str], questions: bool) -> None:
        self.name, self.judged, self.folder = name, MODELS[name], FOLDER / name
        self._questions = self.judged.questions if questions else 0
        self.checkpoint = dequantized_folder(fetch(self.judged.model), self.folder / "checkpoint")
        self._path = self.folder / "rows.json"
        found = Rows()
        if self._path.is_file():
            found = from_json(Rows, json.loads(self._path.read_text(encoding="utf-8")), str(self._path))
        self.own = None if "checkpoint" in again else found.checkpoint
        self.rows = [row for row in found.rows if not any(word in row.name for word in again)]

    def has(self, name: str) -> bool:
        """Returns whether a row was made."""
        return any(row.name == name for row in self.rows)

    def keep(self) -> None:
        """Writes what there is."""
        with replacing(self._path) as fresh:
            fresh.write_text(json.dumps(to_json(Rows(self.own, tuple(self.rows))), indent=1), encoding="utf-8")

    def make(self, words: list[str]) -> dict[str, str]:
        """Makes every row whose name holds one of the words and that is not there; returns what failed, and why."""
        text, other = self._texts()
        material, left_out = self._material(text), dict[str, str]()
        bench = Bench(self.checkpoint, material, self.folder, speeds=True)
        calibration_text = find_text("calibration", "cpu", "cpu", self.checkpoint)
        with progress_line(None) as progress:
            for candidate in candidates(self.checkpoint.config.hidden_size, other):
                if self.has(candidate.name) or not any(word in candidate.name for word in words):
                    continue
                progress(f"{self.name}: {candidate.name}")
                try:
                    self.rows.append(own_row(candidate, bench, calibration_text, self.folder))
                    self.keep()
                except ToolkitError as problem:
                    left_out[candidate.name] = str(problem)
            for name in PEERS:
                if self.has(name) or not any(word in name for word in words):
                    continue
                made, missing = peer_rows(bench, ROOT / "build" / "peers", self.folder / "peers", [name], progress)
                self.rows, left_out = self.rows + made, left_out | missing
                self.keep()
        if material.task and self.own is None and any(word in "checkpoint" for word in words):
            asked = asked_of(self.checkpoint, material.task)
            self.own = reference_answers(self.checkpoint.config, self.checkpoint.source, asked).figures()
            self.keep()
        print(f"\n## {self.name}\n\n{table(material, self.rows, left_out, self.own)}")
        if self.rows:
            print(f"\nplot: {write_scatter(self.folder / 'quality.html', self.name, self.rows)}")
        return left_out

    def _texts(self) -> tuple[Path, Path]:
        """Questions with their answers as conversations: those that are judged, and those that may be calibrated on."""
        lines = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
        paths = self.folder / "judged.jsonl", self.folder / "calibration.jsonl"
        for path, chosen in zip(paths, (lines[:12], lines[_CALIBRATED_ON]), strict=True):
            talks = [{"messages": [_turn("user", x["question"]), _turn("assistant", x["answer"])]} for x in chosen]
            path.write_text("".join(f"{json.dumps(talk)}\n" for talk in talks), encoding="utf-8")
        return paths

    def _material(self, text: Path) -> Material:
        sequences = token_sequences(self.checkpoint, text, _JUDGED_TOKENS, shortest=160)
        calibration_text = find_text("calibration", "cpu", "cpu", self.checkpoint)
        others = token_sequences(self.checkpoint, calibration_text, _IMATRIX_TOKENS, LONGEST)
        return Material(sequences, others, self._task())

    def _task(self) -> Task | None:
        return read_task(QUESTIONS, self._questions) if self._questions else None


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def main() -> int:
    """0 if every row was made, 1 if some are left out, 2 for a bad request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2-135m", "coder-0.5b"], help=", ".join(MODELS))
    parser.add_argument("--only", default="", help="rows whose names hold one of these words, separated by ;")
    parser.add_argument("--again", help="rows to make anew, named in the same way; 'checkpoint' for its own answers")
    parser.add_argument("--no-questions", action="store_true", help="leave GSM8K's answers out: minutes a row")
    asked = parser.parse_args()
    if unknown := [name for name in asked.models if name not in MODELS]:
        print(f"error: no model {unknown[0]!r}, expected some of {', '.join(MODELS)}", file=sys.stderr)
        return 2
    again = asked.again.split(";") if asked.again else []
    questions = not asked.no_questions
    failed = [name for name in asked.models if Table(name, again, questions).make(asked.only.split(";"))]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
