"""The peers' table: python -m benchmarks.peers CHECKPOINT [--text FILE.jsonl] [--calibration FILE.jsonl] …"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Final

from benchmarks.peers.questions import asked_of, fresh_questions
from benchmarks.peers.rows import PEERS, Material, Row, peer_rows
from benchmarks.peers.sampled import sampled_sequences
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.errors import ToolkitError
from toolkit.evaluate.answers import reference_answers
from toolkit.evaluate.tasks import Task, read_task
from toolkit.machine import this_machine
from toolkit.pipeline.text import token_sequences
from toolkit.progress import progress_line
from toolkit.typed_json import to_json

ROOT: Final = Path(__file__).resolve().parent.parent.parent
_COLUMNS: Final = ("mean_kld", "median_kld", "p99_kld", "p999_kld", "top1_agreement")


def main() -> int:
    """0 if every row asked for was made, 1 if some are left out, 2 for a bad request."""
    asked = _arguments()
    try:
        checkpoint = open_checkpoint(asked.checkpoint)
        material = _material(checkpoint, asked)
        with progress_line(None) as progress:
            rows, left_out = peer_rows(checkpoint, material, asked.folder, asked.only, progress)
            progress("the checkpoint itself")
            own = _own_accuracy(checkpoint, material.task)
    except ToolkitError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if asked.json:
        print(json.dumps(_document(asked, material, rows, left_out, own), indent=2))
    else:
        print_table(material, rows, left_out, own)
    return 1 if left_out else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a folder in Hugging Face layout")
    parser.add_argument("--text", type=Path, help="JSON lines with a `text` to measure on (default: sampled from it)")
    parser.add_argument("--tokens", type=int, default=20_000, help="how many of them (default: %(default)s)")
    parser.add_argument("--calibration", type=Path, help="other text, for importance matrices (default: as --text)")
    parser.add_argument("--calibration-tokens", type=int, default=40_000, help="default: %(default)s")
    parser.add_argument("--only", type=_names, default=PEERS, help=f"some of {','.join(PEERS)}")
    parser.add_argument("--task", type=Path, help="JSON lines with a `prompt` and an `answer`")
    parser.add_argument("--questions", type=int, default=0, help="so many fresh questions of tiny-r1's kind instead")
    parser.add_argument("--seed", type=int, default=20251125, help="of questions and of sampled text")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "peers", help="of tools and files")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    """Rows by name, or by what follows the tool's."""
    found = []
    for word in text.split(","):
        rows = [name for name in PEERS if word in (name, name.partition(" ")[2], name.partition(" ")[0])]
        if not rows:
            raise argparse.ArgumentTypeError(f"{word!r} is no peer, expected some of {', '.join(PEERS)}")
        found += rows
    return list(dict.fromkeys(found))


def _material(checkpoint: Checkpoint, asked: argparse.Namespace) -> Material:
    config, source = checkpoint.config, checkpoint.source
    if asked.text:
        sequences = token_sequences(checkpoint, asked.text, asked.tokens, shortest=160)
    else:
        sequences = sampled_sequences(config, source, asked.tokens, asked.seed)
    if asked.calibration:
        calibration = token_sequences(checkpoint, asked.calibration, asked.calibration_tokens, shortest=160)
    elif not any("imatrix" in name for name in asked.only):
        calibration = []
    else:
        calibration = sampled_sequences(config, source, asked.calibration_tokens, asked.seed + 1)
    return Material(sequences, calibration, _task(checkpoint, asked))


def _task(checkpoint: Checkpoint, asked: argparse.Namespace) -> Task | None:
    """The questions named, fresh ones, or none."""
    if asked.questions:
        return fresh_questions(ROOT / "models" / "tiny-r1" / "generate.py", asked.questions, asked.seed)
    return read_task(asked.task) if asked.task else None


def _own_accuracy(checkpoint: Checkpoint, task: Task | None) -> float | None:
    if task is None:
        return None
    answers = reference_answers(checkpoint.config, checkpoint.source, asked_of(checkpoint, task))
    return float(answers.right.mean())


def _document(
    asked: argparse.Namespace, material: Material, rows: list[Row], left_out: dict[str, str], own: float | None
) -> dict[str, Any]:
    return {
        "checkpoint": str(asked.checkpoint),
        "tokens": sum(map(len, material.sequences)),
        "calibration_tokens": sum(map(len, material.calibration_sequences)),
        "questions": len(material.task.questions) if material.task else 0,
        "reference_accuracy": own,
        "machine": to_json(this_machine()),
        "rows": [dataclasses.asdict(row) for row in rows],
        "left_out": left_out,
    }


def print_table(material: Material, rows: list[Row], left_out: dict[str, str], own: float | None) -> None:
    """Rows as Markdown, then what each is made of and what is left out."""
    tokens, calibration = sum(map(len, material.sequences)), sum(map(len, material.calibration_sequences))
    print(f"{tokens} tokens, calibrated on {calibration} others; {_share(own)} of the questions right as it is\n")
    print("| file | bits/weight | mean KLD | median | 99% | 99.9% | top-1 | accuracy | s | peak RSS, MiB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        figures = f"{_figures(row.weights_alone)} | {_share(row.accuracy)}"
        cost = f"{row.wall_s:.1f} | {row.peak_rss_bytes / 2**20:.0f}"
        print(f"| {row.name} | {row.bits_per_weight:.2f} | {figures} | {cost} |")
        if row.as_it_runs:
            print(f"| … as it runs | | {_figures(row.as_it_runs)} | {_share(row.accuracy_as_it_runs)} | | |")
    print()
    for row in rows:
        print(f"{row.name}: {row.note}")
    for name, reason in left_out.items():
        print(f"{name}: left out: {reason}")


def _figures(figures: dict[str, Any]) -> str:
    *klds, agreement = (figures[key] for key in _COLUMNS)
    return " | ".join([*(f"{value:.3g}" for value in klds), f"{100 * agreement:.2f}%"])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


if __name__ == "__main__":
    sys.exit(main())
