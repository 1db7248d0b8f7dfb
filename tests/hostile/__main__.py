"""`python -m tests.hostile [--mutants N] [--seed S] [--parser NAME]`: damaged input by the thousand, one oracle.

Each must end with exit code 0, 1 or 2, in one `error:` line where it is 2, in bounded time and memory, with nothing
written but what was asked for; and an export that ends with 0 has made a bundle that `toolkit verify` finds whole.
What fails is kept as a file, and `python -m tests.hostile --repeat FILE` does it again. Exit code 1 says that something
failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from random import Random
from typing import Any, Final

from tests.hostile.parsers import PARSERS, Parser

_KEPT: Final = Path("build/hostile")
_BATCH: Final = 100
# Longer than any command may take by the oracle, which is stricter.
_HANGS_S: Final = 120.0
_EXAMPLES_SHOWN: Final = 2
# A campaign takes one core.
_THREADS: Final = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
_TOLD_EVERY: Final = 10_000
# A worker that holds more between two batches gives way to a new one.
_MOST_HELD_BYTES: Final = 3 << 30


class Worker:
    """A worker process and what it says; one that died, hangs or holds much memory is replaced by a new one.

    `cpu_s` and `peak_bytes` are the seconds that all of them computed, and the most memory that one has had.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._started = folder, 0
        self.cpu_s, self.peak_bytes = 0.0, 0
        self._start()

    def _start(self) -> None:
        """Starts one in a sandbox of its own, since who was cut off leaves a damaged one."""
        shutil.rmtree(self._folder / f"sandbox-{self._started}", ignore_errors=True)
        self._started += 1
        self._cpu_s = 0.0
        root = self._folder / f"sandbox-{self._started}"
        command = [sys.executable, "-m", "tests.hostile.worker", str(root)]
        environment = {**os.environ, **dict.fromkeys(_THREADS, "1")}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(self._process, self._lines), daemon=True).start()
        if "ready" not in self._next():
            log = root.with_name(f"{root.name}.log")
            raise SystemExit(f"the worker does not start: {log.read_text(errors='replace')[-2000:]}")

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    def _next(self) -> dict[str, Any]:
        """The next line; `{"lost": how}` if the process ended or says nothing."""
        try:
            line = self._lines.get(timeout=_HANGS_S)
        except queue.Empty:
            self._process.kill()
            return {"lost": f"no end within {_HANGS_S:.0f} s"}
        if not line:
            return {"lost": f"the process ended with {self._process.wait()}"}
        found: dict[str, Any] = json.loads(line)
        return found

    def done(self, job: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, str]]]:
        """Every mutant of a job with its outcome; the job ends early with one that ends the process."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        found: list[tuple[dict[str, Any], dict[str, str]]] = []
        mutant: dict[str, Any] = {}
        while "done" not in (line := self._next()):
            if "lost" in line:
                found.append((mutant, {"kind": "failed", "why": line["lost"]}))
                self._process.wait()
                self._start()
                return found
            if "kind" in line:
                found.append((mutant, line))
            else:
                mutant = line
        self.cpu_s += line["cpu_s"] - self._cpu_s
        self._cpu_s, self.peak_bytes = line["cpu_s"], max(self.peak_bytes, line["peak_bytes"])
        if line["peak_bytes"] > _MOST_HELD_BYTES:
            self.close()
            self._start()
        return found

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


class Tally:
    """Counts by parser, and the first examples of each way to fail."""

    def __init__(self) -> None:
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.ways: Counter[tuple[str, str]] = Counter()

    def add(self, mutant: dict[str, Any], outcome: dict[str, str]) -> None:
        """Counts one; keeps and prints one that failed in a way that is new."""
        name = mutant.get("parser", "?")
        self.counts[name][outcome["kind"]] += 1
        if outcome["kind"] != "failed":
            return
        way = name, re.sub(r"'[^']*'|\d+|/\S+", "_", outcome["why"])[:120]
        self.ways[way] += 1
        if self.ways[way] <= _EXAMPLES_SHOWN:
            text = json.dumps(mutant)
            path = _KEPT / f"{name.replace(' ', '-')}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"FAILED {name}: {outcome['why']}\n  again: python -m tests.hostile --repeat {path}", flush=True)

    def show(self) -> int:
        """Prints the table, and how often each way to fail was seen; returns how many failed."""
        whole: Counter[str] = Counter()
        print(f"{'parser':20} {'mutants':>8} {'accepted':>8} {'refused':>8} {'failed':>8}")
        for name, row in [*self.counts.items(), ("all", whole)]:
            if row is not whole:
                whole.update(row)
            print(f"{name:20} {row.total():8} " + " ".join(f"{row[k]:8}" for k in ("accepted", "refused", "failed")))
        for (name, why), count in self.ways.most_common():
            print(f"{count} x {name}: {why}")
        return whole["failed"]


def batches(parsers: list[Parser], mutants: int, seed: int) -> list[dict[str, Any]]:
    """The jobs of a campaign: by each parser's share, in an order in which every stretch is like the whole."""
    share = sum(parser.share for parser in parsers)
    jobs: list[dict[str, Any]] = []
    for parser in parsers:
        left = max(round(mutants * parser.share / share), 2)
        size = min(_BATCH, max(left // 2, 1))
        while left > 0:
            count = min(size, left)
            jobs.append({"parser": parser.name, "seed": seed * 100_000 + len(jobs), "count": count})
            left -= count
    Random(seed).shuffle(jobs)
    return jobs


def _say_how_far(tally: Tally, said: int, seconds: float) -> int:
    """Prints a line at every ten thousand mutants; returns how many tens of thousands have been told of."""
    count = sum(row.total() for row in tally.counts.values())
    failed = sum(row["failed"] for row in tally.counts.values())
    if count // _TOLD_EVERY > said:
        print(f"{count} mutants, {failed} failed, {seconds:.0f} s", flush=True)
    return count // _TOLD_EVERY


def _fails_again(worker: Worker, path: Path) -> bool:
    """Tries a mutant that was kept, and says what becomes of it."""
    ((_, outcome),) = worker.done({"repeat": json.loads(path.read_text(encoding="utf-8"))})
    print(f"{path.name}: {outcome['kind']}: {outcome['why']}", flush=True)
    return outcome["kind"] == "failed"


def main() -> None:
    """Runs a campaign, or one mutant again."""
    known = [parser.name for parser in PARSERS]
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mutants", type=int, default=100_000)
    options.add_argument("--seed", type=int, default=14)
    options.add_argument("--parser", action="append", choices=known)
    options.add_argument("--minutes", type=float, default=600.0, help="end after so many, with what was counted")
    options.add_argument("--repeat", type=Path, nargs="+", metavar="FILE")
    asked = options.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="hostile-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    begin, tally = time.monotonic(), Tally()
    worker = Worker(folder)
    try:
        if asked.repeat:
            sys.exit(any([_fails_again(worker, path) for path in asked.repeat]))
        chosen = [parser for parser in PARSERS if not asked.parser or parser.name in asked.parser]
        print(f"seed {asked.seed}, {asked.mutants} mutants of {len(chosen)} parsers", flush=True)
        said = 0
        for job in batches(chosen, asked.mutants, asked.seed):
            for mutant, outcome in worker.done(job):
                tally.add(mutant, outcome)
            said = _say_how_far(tally, said, time.monotonic() - begin)
            if time.monotonic() - begin > 60 * asked.minutes:
                break
        failed = tally.show()
        took = f"{time.monotonic() - begin:.0f} s, {worker.cpu_s:.0f} s of CPU"
        print(f"{took}, at most {worker.peak_bytes / 2**20:.0f} MiB, seed {asked.seed}", flush=True)
        sys.exit(bool(failed))
    finally:
        worker.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
