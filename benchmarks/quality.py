"""One table of quality: this toolkit's algorithms, blocks and budgets beside its peers, on one checkpoint and text.

python -m benchmarks.quality CHECKPOINT [--text FILE.jsonl] [--calibration FILE.jsonl] [--questions N] [--peers]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.answering import Material, asked_of, fresh_questions
from benchmarks.candidates import ROOT, Candidate, bundle_of, own_row, rule
from benchmarks.peers.rows import PEERS, Bench, Row, peer_rows
from benchmarks.peers.sampled import sampled_sequences
from benchmarks.scatter import write_scatter
from benchmarks.table import table
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.errors import ToolkitError
from toolkit.evaluate.answers import reference_answers
from toolkit.evaluate.tasks import read_task
from toolkit.pipeline.text import LONGEST, token_sequences
from toolkit.progress import progress_line
from toolkit.quality import QUALITIES
from toolkit.typed_json import Json, to_json


def candidates(budgets: list[float], hidden_size: int) -> list[Candidate]:
    """The rules of the cpu target at each quality; every algorithm x block size that divides the rows of the embedding,
    with and without rotation, folding and budgets of bits per weight."""
    sizes = [size for size in (32, 64, 128) if hidden_size % size == 0]
    found = [Candidate("rtn 32 symmetric", {"quantize": [rule(32, "rtn", symmetric=True)], "rotate": False})]
    found += [Candidate(f"own rules, {quality}", {"quality": quality}) for quality in QUALITIES]
    for block_size in sizes:
        found.append(Candidate(f"rtn {block_size}", {"quantize": [rule(block_size, "rtn")], "rotate": False}))
        for quality in ("fast", "balanced", "best"):
            plain: dict[str, Json] = {"quantize": [rule(block_size)], "quality": quality}
            found.append(Candidate(f"{quality} {block_size}", plain))
            if quality == "fast":
                found.append(Candidate(f"fast {block_size}, not rotated", {**plain, "rotate": False}))
            else:
                found.append(Candidate(f"{quality} {block_size}, no folds", {**plain, "fold": False}))
    for quality in ("balanced", "best"):
        for block_size in sizes[1:]:
            for budget in budgets:
                changes = {"quantize": [rule(block_size)], "quality": quality, "bits_per_weight": budget}
                found.append(Candidate(f"{quality} {block_size}, budget {budget}", changes))
    return [*found, Candidate("fast 32, 8 bits", {"quantize": [{**rule(32), "bits": 8}]})]


def main() -> int:
    """0 if every row was made, 1 if some are left out, 2 for a bad request."""
    asked = _arguments()
    work = ROOT / "build" / "quality" / asked.checkpoint.resolve().name
    work.mkdir(parents=True, exist_ok=True)
    try:
        checkpoint = open_checkpoint(asked.checkpoint)
        material, calibration_text = _material(checkpoint, asked, work)
    except ToolkitError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    bench, rows, left_out = Bench(checkpoint, material, work), list[Row](), dict[str, str]()
    words = asked.only.split(";")
    with progress_line(None) as progress:
        for candidate in candidates(asked.budgets, checkpoint.config.hidden_size):
            if not any(word in candidate.name for word in words):
                continue
            progress(candidate.name)
            try:
                rows.append(own_row(candidate, bench, calibration_text, work))
                shutil.rmtree(bundle_of(candidate, work))
            except ToolkitError as problem:
                left_out[candidate.name] = str(problem)
        if asked.peers:
            names = [name for name in PEERS if any(word in name for word in words)]
            peers, missing = peer_rows(bench, asked.folder, work, names, progress)
            rows, left_out = rows + peers, left_out | missing
    own = None
    if material.task:
        own = reference_answers(checkpoint.config, checkpoint.source, asked_of(checkpoint, material.task)).figures()
    print(table(material, rows, left_out, own))
    (work / "rows.json").write_text(json.dumps([to_json(row) for row in rows], indent=1), encoding="utf-8")
    page = write_scatter(work / "quality.html", asked.checkpoint.resolve().name, rows)
    print(f"\nplot: {page}")
    return 1 if left_out else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a folder in Hugging Face layout")
    parser.add_argument("--text", type=Path, help="JSON lines with a `text` to measure on (default: sampled from it)")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--calibration", type=Path, help="other text to calibrate on (default: sampled from it)")
    parser.add_argument("--task", type=Path, help="JSON lines of questions and answers")
    parser.add_argument("--questions", type=int, default=0, help="so many fresh questions of tiny-r1's kind instead")
    parser.add_argument("--seed", type=int, default=20251125, help="of questions and of sampled text")
    parser.add_argument("--budgets", type=_numbers, default=[4.5, 4.9], help="bits per weight, separated by commas")
    parser.add_argument("--only", default="", help="rows whose names hold one of these words, separated by ;")
    parser.add_argument("--peers", action="store_true", help="llama.cpp and onnxruntime-genai's builder beside")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "peers", help="of the peers' tools and files")
    return parser.parse_args()


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _material(checkpoint: Checkpoint, asked: argparse.Namespace, work: Path) -> tuple[Material, Path]:
    """What is measured on, and the calibration text: the same for the toolkit and its peers."""
    config, source = checkpoint.config, checkpoint.source
    calibration_text = asked.calibration
    if calibration_text is None:
        tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
        calibration_text = work / "calibration.jsonl"
        texts = [tokenizer.decode(ids) for ids in sampled_sequences(config, source, asked.tokens, asked.seed + 1)]
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        calibration_text.write_text("".join(lines), encoding="utf-8")
    if asked.text:
        sequences = token_sequences(checkpoint, asked.text, asked.tokens, shortest=160)
    else:
        sequences = sampled_sequences(config, source, asked.tokens, asked.seed)
    task = None
    if asked.questions:
        task = fresh_questions(ROOT / "models" / "tiny-r1" / "generate.py", asked.questions, asked.seed)
    elif asked.task:
        task = read_task(asked.task)
    others = token_sequences(checkpoint, calibration_text, asked.tokens, LONGEST)
    return Material(sequences, others, task), calibration_text


if __name__ == "__main__":
    sys.exit(main())
