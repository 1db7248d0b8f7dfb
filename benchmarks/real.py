"""One table a trained model: qualities and sizes beside llama.cpp, onnxruntime-genai's builder and AutoRound.

    python -m benchmarks.real [MODEL …] [--only NAME;WORD] [--again NAME;WORD] [--no-questions] [--no-speed]

Judged on GSM8K (benchmarks/data/gsm8k.jsonl, its first 400 test questions): KLD on conversations of the first of them,
greedy answers to as many as the model's row says, none of which is calibrated on. Calibration is the product's own
default, and once conversations of the last hundred. The checkpoint is what the file dequantizes to, in float16: its
weights stand on that file's grid, which flatters formats of the same blocks, llama.cpp's and ours. MODEL-shuffled is
the same function with its channels in another order, so that its weights stand on no grid (benchmarks/shuffled.py).

A row that an earlier run made is kept, in build/bench-real/MODEL/rows.json, so that what was stopped goes on; what it
lacks is made up for. Answers are questions of hours, so only the rows that users choose between are asked. Quality can
be had on a busy machine (--no-speed): a later run on a quiet one adds the speeds, of bundles that are kept until then.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.answering import asked_of
from benchmarks.candidates import ROOT, Candidate, bundle_of, own_row, rule
from benchmarks.dequantized import dequantized_folder
from benchmarks.judged import QUESTIONS, judged_material, judged_texts
from benchmarks.models import CODER_05B, CODER_15B, SMOLLM2, RealModel, fetch
from benchmarks.peers.rows import Bench, Row, peer_rows
from benchmarks.scatter import write_scatter
from benchmarks.table import table
from toolkit.checkpoint.opened import Checkpoint
from toolkit.errors import ToolkitError
from toolkit.evaluate.answers import reference_answers
from toolkit.evaluate.tasks import read_task
from toolkit.files import replacing
from toolkit.pipeline.text import find_text
from toolkit.progress import progress_line
from toolkit.report.sections import Answered
from toolkit.typed_json import Json, from_json, to_json

FOLDER: Final = ROOT / "build" / "bench-real"


@dataclass(frozen=True)
class Judged:
    """A model, and how many questions it answers: enough for a standard error that tells files apart, and no more,
    since every answer is hundreds of passes. `shuffled` puts its channels in another order."""

    model: RealModel
    questions: int = 0
    shuffled: bool = False

    def checkpoint(self, folder: Path) -> Checkpoint:
        """The model's checkpoint, which is fetched and written into `folder` unless it is there."""
        return dequantized_folder(fetch(self.model), folder, self.shuffled)


MODELS: Final = {
    "smollm2-135m": Judged(SMOLLM2),
    "coder-0.5b": Judged(CODER_05B, 300),
    "coder-1.5b": Judged(CODER_15B, 150),
    "smollm2-135m-shuffled": Judged(SMOLLM2, shuffled=True),
    "coder-0.5b-shuffled": Judged(CODER_05B, shuffled=True),
    "coder-1.5b-shuffled": Judged(CODER_15B, shuffled=True),
}
_LLAMA_TYPES: Final = ("q4_0", "iq4_xs+imatrix", "q4_k_m", "q4_k_m+imatrix", "q5_k_m")
PEERS: Final = (*(f"llama.cpp {kind}" for kind in _LLAMA_TYPES), "genai default", "genai k_quant_mixed", "auto-round")
WIDE_KEYS: Final[Json] = {"match": "*.k_proj|*.v_proj", "bits": 8, "block_size": 32}
EMBEDDING: Final[Json] = {"match": "model.embed_tokens", "block_size": 32}
# Beside peers that leave the embedding in floats: a model of 135M has a fifth of its weights there.
_WIDE_EMBEDDING: Final[Json] = {"match": "lm_head|model.embed_tokens", "bits": 8, "block_size": 32}
# Some minutes a step for a 1.5B on a CPU: for the smallest model, or where torch has a GPU.
TUNED: Final[dict[str, Json]] = {"tuning_steps": 64, "calibration_tokens": 16384}
# Rows that answer questions.
_ASKED: Final = frozenset(
    ["fast", "balanced", "best", "llama.cpp q4_0", "llama.cpp iq4_xs+imatrix", "llama.cpp q4_k_m+imatrix"]
)


@dataclass(frozen=True)
class Rows:
    """What is measured of a model so far; `right` lists the questions that the checkpoint answers rightly."""

    checkpoint: Answered | None = None
    right: tuple[int, ...] = ()
    rows: tuple[Row, ...] = ()


def wanted(name: str, words: list[str], names: list[str]) -> bool:
    """Whether a row is named: a word that is a row's whole name means that row alone, another every row that holds
    it."""
    return any(word == name if word in names else word in name for word in words)


def larger_blocks(hidden_size: int) -> list[int]:
    """Returns the block sizes beyond 32 that divide a model's rows."""
    return [size for size in (64, 128) if hidden_size % size == 0]


def candidates(hidden_size: int, other_text: Path) -> Iterator[Candidate]:
    """Yields the target's own rules at every quality, then other sizes. `other_text` is text of the judged kind."""
    yield Candidate("fast", {"quality": "fast"})
    yield Candidate("balanced", {"quality": "balanced"})
    yield Candidate("best", {"quality": "best"})
    wide: list[Json] = [WIDE_KEYS, _WIDE_EMBEDDING, rule(32)]
    yield Candidate("balanced, 8-bit embedding", {"quality": "balanced", "quantize": wide})
    yield Candidate("balanced, budget 4.9", {"quality": "balanced", "bits_per_weight": 4.9})
    yield Candidate("best, budget 4.9", {"quality": "best", "bits_per_weight": 4.9})
    yield Candidate("best, budget 5.29", {"quality": "best", "bits_per_weight": 5.29})
    for block_size in (16, 32):
        rules: list[Json] = [WIDE_KEYS, rule(block_size)]
        yield Candidate(f"best, blocks of {block_size}", {"quality": "best", "quantize": rules})
    tuned: dict[str, Json] = {"quality": "best", "quantize": [WIDE_KEYS, EMBEDDING, rule(16)], **TUNED}
    yield Candidate("best, blocks of 16, tuned", tuned)
    yield Candidate("rtn 32 symmetric", {"quantize": [rule(32, "rtn", symmetric=True)], "rotate": False})
    for block_size in larger_blocks(hidden_size):
        yield Candidate(f"balanced, blocks of {block_size}", {"quantize": [rule(block_size)], "quality": "balanced"})
    yield Candidate("balanced, calibrated on GSM8K", {"quality": "balanced", "calibration": str(other_text)})


class Table:
    """The rows of one model, kept as they come."""

    def __init__(self, name: str, again: list[str], questions: bool, speeds: bool) -> None:
        self.name, self.judged, self.folder = name, MODELS[name], FOLDER / name
        self._questions, self._speeds = self.judged.questions if questions else 0, speeds
        self.checkpoint = self.judged.checkpoint(self.folder / "checkpoint")
        self._path = self.folder / "rows.json"
        found = Rows()
        if self._path.is_file():
            found = from_json(Rows, json.loads(self._path.read_text(encoding="utf-8")), str(self._path))
        self.own, self.right = (None, ()) if "checkpoint" in again else (found.checkpoint, found.right)
        names = [row.name for row in found.rows]
        self.rows = {row.name: row for row in found.rows if not wanted(row.name, again, names)}

    def keep(self) -> None:
        """Writes what there is."""
        found = Rows(self.own, self.right, tuple(self.rows.values()))
        with replacing(self._path) as fresh:
            fresh.write_text(json.dumps(to_json(found), indent=1), encoding="utf-8")

    def make(self, words: list[str]) -> dict[str, str]:
        """Makes what is lacking of every row that the words name; returns what failed, and why."""
        text, other = judged_texts(self.folder)
        task = read_task(QUESTIONS, self._questions) if self._questions else None
        material, left_out = judged_material(self.checkpoint, text, task), dict[str, str]()
        bench = Bench(self.checkpoint, material, self.folder)
        own = {candidate.name: candidate for candidate in candidates(self.checkpoint.config.hidden_size, other)}
        names = [*own, *PEERS, "checkpoint"]
        calibration_text = find_text("calibration", "cpu", "cpu", self.checkpoint)
        with progress_line(None) as progress:
            for name in (name for name in (*own, *PEERS) if wanted(name, words, names)):
                asking = self._lacking(bench, name)
                if asking is None:
                    continue
                progress(f"{self.name}: {name}")
                try:
                    if name in own:
                        self._add(own_row(own[name], asking, calibration_text, self.folder))
                        if self._is_whole(name):
                            shutil.rmtree(bundle_of(own[name], self.folder))
                    else:
                        peers, work = ROOT / "build" / "peers", self.folder / "peers"
                        made, missing = peer_rows(asking, peers, work, [name], progress)
                        left_out |= missing
                        for row in made:
                            self._add(row)
                except ToolkitError as problem:
                    left_out[name] = str(problem)
        if material.task and self.own is None and wanted("checkpoint", words, names):
            asked = asked_of(self.checkpoint, material.task)
            answers = reference_answers(self.checkpoint.config, self.checkpoint.source, asked)
            self.own, self.right = answers.figures(), tuple(int(k) for k in np.flatnonzero(answers.right))
            self.keep()
        rows = list(self.rows.values())
        print(f"\n## {self.name}\n\n{table(material, rows, left_out, self.own, self.right)}")
        if rows:
            print(f"\nplot: {write_scatter(self.folder / 'quality.html', self.name, rows)}")
        return left_out

    def _lacking(self, bench: Bench, name: str) -> Bench | None:
        """The bench for what a row lacks of what is asked for, or None where it has all."""
        row, asked = self.rows.get(name), self._questions and name in _ASKED
        answers = bool(asked and (row is None or row.answered is None))
        speeds = self._speeds and (row is None or row.decode_tokens_per_s is None)
        return bench.asking(answers, speeds) if row is None or answers or speeds else None

    def _is_whole(self, name: str) -> bool:
        """Whether nothing is left to measure of a row, so that its bundle can go."""
        row, asked = self.rows[name], bool(self.judged.questions and name in _ASKED)
        return row.decode_tokens_per_s is not None and (row.answered is not None or not asked)

    def _add(self, row: Row) -> None:
        """Keeps a row with what was measured of it before and is not in it."""
        if old := self.rows.get(row.name):
            answered = (row.answered, row.right) if row.answered else (old.answered, old.right)
            timed = row if row.decode_tokens_per_s is not None else old
            row = replace(
                old,
                answered=answered[0],
                right=answered[1],
                prefill_tokens_per_s=timed.prefill_tokens_per_s,
                decode_tokens_per_s=timed.decode_tokens_per_s,
                timed_at_load=timed.timed_at_load,
            )
        self.rows[row.name] = row
        self.keep()


def main() -> int:
    """0 if every row was made, 1 if some are left out, 2 for a bad request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2-135m", "coder-0.5b"], help=", ".join(MODELS))
    parser.add_argument("--only", default="", help="rows of these names, or that hold these words, separated by ;")
    parser.add_argument("--again", help="rows to make anew, named in the same way; 'checkpoint' for its own answers")
    parser.add_argument("--no-questions", action="store_true", help="leave GSM8K's answers out: minutes a row")
    parser.add_argument("--no-speed", action="store_true", help="leave tokens/s to a run on a quiet machine")
    asked = parser.parse_args()
    if unknown := [name for name in asked.models if name not in MODELS]:
        print(f"error: no model {unknown[0]!r}, expected some of {', '.join(MODELS)}", file=sys.stderr)
        return 2
    again = asked.again.split(";") if asked.again else []
    tables = (Table(name, again, not asked.no_questions, not asked.no_speed) for name in asked.models)
    failed = [made.name for made in tables if made.make(asked.only.split(";"))]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
