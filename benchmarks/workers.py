"""What a second worker of one machine brings an export.

    python -m benchmarks.workers CHECKPOINT [--tokens 1024] [--workers 1,2] [--quality balanced] [--one-thread]

Exports the checkpoint for the CPU once for each number of workers, a thread each, and prints the seconds of each phase,
how many times the first number's they are, and whether the data files are the same. The exporting process has every
core while its workers wait, as in any export; `--one-thread` holds it to one. What is compiled once is compiled before,
by an export of tiny-r1. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.command_line import run_toolkit
from toolkit.errors import ToolkitError

_ONE_THREAD: Final = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def exported(recipe: str, checkpoint: str | None, out: Path, words: Sequence[str], one_thread: bool) -> float:
    """Exports in a process of its own; returns its seconds. Raises ToolkitError if that fails."""
    command = ["export", recipe, "--no-validate", "--out", str(out), *words]
    command += ["--checkpoint", checkpoint] if checkpoint else []
    start = time.perf_counter()
    run_toolkit(command, dict.fromkeys(_ONE_THREAD, "1") if one_thread else {})
    return time.perf_counter() - start


def main(words: Sequence[str]) -> int:
    """Prints a row for each number of workers; returns 0 if all data files are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--quality", default="balanced")
    parser.add_argument("--one-thread", action="store_true", help="for the exporting process too")
    asked = parser.parse_args(words)
    rows = list[tuple[str, float, str]]()
    with tempfile.TemporaryDirectory() as folder:
        compiling = ["--workers", "1", "--set", "bits_per_weight=0"]
        exported("tiny-r1-cpu", None, Path(folder) / "tiny", compiling, asked.one_thread)
        print("| workers | all s | survey s | solving s | of the first | same bytes |\n|---|---|---|---|---|---|")
        for workers in asked.workers.split(","):
            out = Path(folder) / f"of-{workers}"
            options = ["--workers", workers, "--quality", asked.quality, "--set", f"calibration_tokens={asked.tokens}"]
            seconds = exported("cpu", asked.checkpoint, out, options, asked.one_thread)
            (data,) = out.glob("*.data")
            with data.open("rb") as file:
                rows.append((workers, seconds, hashlib.file_digest(file, "sha256").hexdigest()))
            report = json.loads((out / "report.json").read_text(encoding="utf-8"))
            took = report["quantization"].get("calibration") or {}
            phases = [f"{took.get(key) or 0:.0f}" for key in ("survey_s", "solve_s")]
            cells = [workers, f"{seconds:.0f}", *phases, f"{rows[0][1] / seconds:.2f}", str(rows[-1][2] == rows[0][2])]
            print(f"| {' | '.join(cells)} |")
            data.unlink()
    return 0 if len({digest for _, _, digest in rows}) == 1 else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ToolkitError as problem:
        sys.exit(f"error: {problem}")
