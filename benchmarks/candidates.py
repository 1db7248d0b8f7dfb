"""Ways to make a bundle of a checkpoint, and the row of one: exported in a process of its own, then measured."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from benchmarks.answering import machine_load
from benchmarks.command_line import run_toolkit
from benchmarks.peers.rows import Bench, Row, run_in_genai
from toolkit.evaluate.positions import open_positions
from toolkit.typed_json import Json

ROOT: Final = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Candidate:
    """One way to make a bundle: `changes` to the recipe of a bare cpu target."""

    name: str
    changes: dict[str, Json]


def rule(block_size: int, algorithm: str = "auto", symmetric: bool = False) -> dict[str, Json]:
    """Returns a recipe's rule for every matrix, of 4 bits where nothing else is said."""
    return {"match": "*", "algorithm": algorithm, "block_size": block_size, "symmetric": symmetric}


def bundle_of(candidate: Candidate, work: Path) -> Path:
    """Where the bundle of a candidate lies while it is measured."""
    return work / candidate.name.replace(" ", "-").replace(",", "")


def own_row(candidate: Candidate, bench: Bench, calibration_text: Path, work: Path) -> Row:
    """Exports the candidate in a process of its own, if its bundle is not there, and measures it; the bundle stays.
    Raises ToolkitError if that fails."""
    load, out = machine_load(), bundle_of(candidate, work)
    report = _exported(candidate, bench, calibration_text, out)
    exact, running, sequences = open_positions(out, exact=True), open_positions(out), bench.material.sequences
    calibrated = report["quantization"].get("calibration", {})
    folds, fallen = len(calibrated.get("folded", [])), len(calibrated.get("fallbacks", []))
    note = "rotated" if report["quantization"].get("rotated") else "as it is"
    if calibrated:
        note = f"{folds} inputs folded, {fallen} matrices fell back, {calibrated['tokens']} tokens"
    row = Row(
        name=candidate.name,
        bits_per_weight=report["quantization"]["bits_per_weight"],
        weights_alone=bench.compare(lambda k: exact.logits(sequences[k])),
        as_it_runs=bench.compare(lambda k: running.logits(sequences[k])),
        wall_s=report["conversion"]["wall_s"],
        peak_rss_bytes=report["conversion"]["peak_rss_bytes"],
        note=note,
        load=load,
    )
    return run_in_genai(out, bench, row)


def _exported(candidate: Candidate, bench: Bench, calibration_text: Path, out: Path) -> dict[str, Any]:
    """The report of the candidate's export."""
    checkpoint, recipe = bench.checkpoint, out.with_name(f"{out.name}.yaml")
    asked = {
        "name": "quality-cpu",
        "model": str(checkpoint.folder),
        "target": "cpu",
        "calibration": str(calibration_text.resolve()),
        "context_length": min(1024, checkpoint.config.max_position_embeddings),
        "validate": {},
        **candidate.changes,
    }
    text, report = yaml.safe_dump(asked), out / "report.json"
    if report.is_file() and recipe.is_file() and recipe.read_text(encoding="utf-8") == text:
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return found
    recipe.write_text(text, encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    words = [
        "export",
        str(recipe),
        "--checkpoint",
        str(checkpoint.folder),
        "--out",
        str(out),
        "--no-validate",
        "--json",
    ]
    made: dict[str, Any] = json.loads(run_toolkit(words))
    return made
