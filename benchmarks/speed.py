"""Speed on this CPU beside llama.cpp at equal KLD: `python -m benchmarks.speed [MODEL …]`, or `make bench-speed`.

Bundles of this toolkit and llama.cpp's files are made of one checkpoint, the first time, into build/bench-speed/MODEL,
where they stay, and judged once as `benchmarks.real` judges; `--no-speed` ends there, on a machine that may be busy.
Then all decode and prefill in turns, each in a process of its own: bundles by `toolkit bench`, files by llama-bench. So
what else the machine does meets all alike, and ratios are of turns of one round. A turn during which other processes
took more than a tenth of a core is taken again, and marked with ~ where it never was alone.

The verdict is that of llama.cpp's cheapest file, by bits, whose KLD is not above the bundle's; where none is as good
(`best` on SmolLM2), that of the best there is: add "llama.cpp q5_k_m" to --files. Where the checkpoint was dequantized
from the same kind of file (Coder's are Q4_K_M), that stands on its own grid, and its KLD is flattered: MODEL-shuffled
stands on none. On two quiet cores the two small models take about 25 minutes the first time and 12 after that; the 1.5B
as long.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import psutil

from benchmarks.candidates import ROOT, Candidate, bundle_of, own_row, rule
from benchmarks.judged import judged_material, judged_texts
from benchmarks.peers.llama_cpp import LLAMA_TYPES, LlamaCpp, llama_cpp, speed
from benchmarks.peers.rows import Bench, Row, llama_file, peer_rows
from benchmarks.real import EMBEDDING, MODELS, TUNED, WIDE_KEYS, Rows, candidates, larger_blocks
from toolkit.bundle.settings import read_settings
from toolkit.checkpoint.opened import Checkpoint
from toolkit.errors import ToolkitError
from toolkit.evaluate.linked import linked_copy
from toolkit.evaluate.speed import measure_speed_apart
from toolkit.files import replacing
from toolkit.machine import physical_cores
from toolkit.pipeline.text import find_text
from toolkit.progress import progress_line
from toolkit.recipe import BLOCK_SIZES
from toolkit.typed_json import Json, from_json, to_json

FOLDER: Final = ROOT / "build" / "bench-speed"
LLAMA: Final = ("llama.cpp q4_0", "llama.cpp iq4_xs+imatrix", "llama.cpp q4_k_m")
PREFILL_AIM: Final = 1.3
DECODE_AIM: Final = 1.15
# The largest blocks that a recipe's rule takes.
_LARGEST: Final = max(BLOCK_SIZES)
_REPEAT: Final = 3
_TRIES: Final = 3
# Cores that others may take during a turn.
_QUIET: Final = 0.1


@dataclass(frozen=True)
class Turn:
    """Tokens/s of one file in one round; `others` is how many cores other processes kept busy meanwhile, None where
    the system does not say."""

    file: str
    threads: int
    round: int
    prefill: float
    decode: float
    others: float | None

    def is_disturbed(self) -> bool:
        """Whether the machine was not its own."""
        return self.others is not None and self.others > _QUIET


@dataclass(frozen=True)
class Ratio:
    """Of a bundle's tokens/s to those of one of llama.cpp's files, round by round."""

    prefill: tuple[float, ...]
    decode: tuple[float, ...]

    def reaches(self) -> bool:
        """Whether both medians are at their aims."""
        prefill, decode = statistics.median(self.prefill), statistics.median(self.decode)
        return prefill >= PREFILL_AIM and decode >= DECODE_AIM


def made(name: str, words: Sequence[str]) -> dict[str, Row]:
    """The rows of a model's files that `words` name, each made and judged if it is not there."""
    folder = FOLDER / name
    path, found = folder / "rows.json", Rows()
    if path.is_file():
        found = from_json(Rows, json.loads(path.read_text(encoding="utf-8")), str(path))
    rows = {row.name: row for row in found.rows if _place(name, row.name).exists()}
    for row in _lacking(name, [word for word in words if word not in rows]):
        rows[row.name] = row
        with replacing(path) as fresh:
            fresh.write_text(json.dumps(to_json(Rows(rows=tuple(rows.values()))), indent=1), encoding="utf-8")
    return {word: rows[word] for word in words}


def _lacking(name: str, words: Sequence[str]) -> Iterator[Row]:
    """Makes and judges a file a word. Raises ToolkitError for one that cannot be made."""
    if not words:
        return
    folder, peers = FOLDER / name, ROOT / "build" / "peers"
    checkpoint = _checkpoint(name)
    text, other = judged_texts(folder)
    hidden_size = checkpoint.config.hidden_size
    own = {candidate.name: candidate for candidate in (*candidates(hidden_size, other), *_wider(hidden_size))}
    known = [*own, *(f"llama.cpp {kind}" for kind in LLAMA_TYPES)]
    if unknown := next((word for word in words if word not in known), None):
        raise ToolkitError(f"no row {unknown!r}, expected some of {', '.join(known)}")
    bench = Bench(checkpoint, judged_material(checkpoint, text), folder, keeps_files=True)
    calibration_text = find_text("calibration", "cpu", "cpu", checkpoint)
    with progress_line(None) as progress:
        for word in words:
            progress(f"{name}: {word}")
            if word in own:
                yield own_row(own[word], bench, calibration_text, folder)
                continue
            # One at a time, so that each is kept when it is there.
            rows, left_out = peer_rows(bench, peers, folder, [word], progress)
            if left_out:
                raise ToolkitError(f"{word}: {left_out[word]}")
            yield rows[0]


def _checkpoint(name: str) -> Checkpoint:
    return MODELS[name].checkpoint(FOLDER / name / "checkpoint")


def _wider(hidden_size: int) -> Iterator[Candidate]:
    """Yields formats in larger blocks, which take fewer bytes of a session and are multiplied faster."""
    for size in larger_blocks(hidden_size):
        rules: list[Json] = [WIDE_KEYS, rule(size)]
        yield Candidate(f"balanced, {size} but k and v", {"quality": "balanced", "quantize": rules})
        yield Candidate(f"best, {size} but k and v", {"quality": "best", "quantize": rules})
        yield Candidate(f"best, {size} but k and v, tuned", {"quality": "best", "quantize": rules, **TUNED})
        attention: Json = {"match": "*.q_proj|*.k_proj|*.v_proj|*.o_proj", "bits": 8, "block_size": size}
        mixed: list[Json] = [attention, {"match": "*.gate_proj|*.up_proj", "block_size": size}, rule(32)]
        name = f"balanced, {size} but down, 8 bits in attention"
        yield Candidate(name, {"quality": "balanced", "quantize": mixed})
    if hidden_size % _LARGEST == 0:
        rules = [{"match": "*.k_proj|*.v_proj", "bits": 8, "block_size": _LARGEST}, EMBEDDING, rule(_LARGEST)]
        yield Candidate(f"balanced, {_LARGEST} but the embedding", {"quality": "balanced", "quantize": rules})


def _place(name: str, word: str) -> Path:
    """Where a row's bundle or file lies."""
    if word.startswith("llama.cpp "):
        return llama_file(FOLDER / name, word)
    return bundle_of(Candidate(word, {}), FOLDER / name)


def turns(files: Sequence[str], threads: Sequence[int], rounds: int, run: Callable[[str, int], Turn]) -> Iterator[Turn]:
    """Yields rounds of turns, every other one backwards; a turn that was disturbed is taken again."""
    for number in range(rounds):
        for count in threads:
            for file in files if number % 2 == 0 else list(files)[::-1]:
                taken = run(file, count)
                for _ in range(_TRIES - 1):
                    if not taken.is_disturbed():
                        break
                    taken = min(taken, run(file, count), key=lambda turn: turn.others or 0)
                yield replace(taken, round=number)


def timed(tools: LlamaCpp, name: str, prompt_tokens: int, new_tokens: int, word: str, threads: int) -> Turn:
    """One turn of a model's bundle or file."""
    path, wall, busy = _place(name, word), time.perf_counter(), _others_s()
    if path.is_dir():
        with linked_copy(path, read_settings(path).with_threads(threads)) as folder:
            measured = measure_speed_apart(Path(folder), prompt_tokens, new_tokens, _REPEAT)
        prefill, decode = measured.prefill_tokens_per_s, measured.decode_tokens_per_s
    else:
        prefill, decode = speed(tools, path, prompt_tokens, new_tokens, _REPEAT, threads)
    took = time.perf_counter() - wall
    others = None if busy is None else max(0.0, ((_others_s() or 0) - busy) / took)
    return Turn(word, threads, 0, prefill, decode, others)


def _others_s() -> float | None:
    """CPU seconds so far of all processes but this one and its children that ended; None where their seconds are not
    told."""
    if os.name == "nt":
        return None
    times, own = psutil.cpu_times(), os.times()
    busy: float = times.user + times.system + getattr(times, "nice", 0.0)
    return busy - own.user - own.system - own.children_user - own.children_system


def equal(ours: Row, others: Sequence[Row]) -> Row:
    """The cheapest of llama.cpp's files whose KLD as it runs is not above a bundle's, or the one of least KLD."""
    good = [row for row in others if _kld(row) <= _kld(ours)]
    return min(good, key=lambda row: row.bits_per_weight) if good else min(others, key=_kld)


def _kld(row: Row) -> float:
    return row.as_it_runs.mean_kld if row.as_it_runs else float("inf")


def ratio(taken: Sequence[Turn], ours: str, other: str, threads: int) -> Ratio:
    """Of all rounds in which both had their turn."""
    of = {(turn.file, turn.round): turn for turn in taken if turn.threads == threads}
    rounds = sorted(k for file, k in of if file == ours and (other, k) in of)
    pairs = [(of[ours, k], of[other, k]) for k in rounds]
    return Ratio(tuple(a.prefill / b.prefill for a, b in pairs), tuple(a.decode / b.decode for a, b in pairs))


def told(rows: Sequence[Row], taken: Sequence[Turn]) -> str:
    """Returns both tables: every file with its medians, and every bundle beside every file."""
    counts = sorted({turn.threads for turn in taken})
    heads = ("file", "bits/weight", "KLD as it runs", *(f"prefill, decode on {k} threads" for k in counts))
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for row in rows:
        speeds = (_speeds([t for t in taken if (t.file, t.threads) == (row.name, k)]) for k in counts)
        lines.append(_line((row.name, f"{row.bits_per_weight:.2f}", f"{_kld(row):.4f}", *speeds)))
    return "\n".join([*lines, "", *_beside(rows, taken, counts)])


def _beside(rows: Sequence[Row], taken: Sequence[Turn], counts: Sequence[int]) -> Iterator[str]:
    heads = ("bundle / file", "KLD", "threads", "prefill", "decode", f"{PREFILL_AIM} and {DECODE_AIM} at equal KLD")
    yield from (_line(heads), "|" + "---|" * len(heads))
    others = [row for row in rows if row.name.startswith("llama.cpp ")]
    for ours in (row for row in rows if row not in others):
        for other in others:
            for count in counts:
                found = ratio(taken, ours.name, other.name, count)
                verdict = ("reached" if found.reaches() else "missed") if other is equal(ours, others) else ""
                pair = (f"{ours.name} / {other.name}", f"{_kld(ours) / _kld(other):.2f}", count)
                yield _line((*pair, _spread(found.prefill), _spread(found.decode), verdict))


def _speeds(turns: Sequence[Turn]) -> str:
    """Medians, with ~ where another process ran beside a turn."""
    mark = "~" if any(turn.is_disturbed() for turn in turns) else ""
    prefill, decode = (statistics.median(rates) for rates in zip(*((t.prefill, t.decode) for t in turns), strict=True))
    return f"{mark}{prefill:.0f}, {decode:.1f}"


def _spread(ratios: Sequence[float]) -> str:
    """The median, and the least and the most of the rounds."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    """0 if every bundle reaches the aims at equal KLD, 1 if one misses them, 2 for a bad request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2-135m", "coder-0.5b"], help=", ".join(MODELS))
    parser.add_argument("--files", help="rows of `benchmarks.real` or of this module, separated by ;")
    counts = sorted({1, min(2, physical_cores()), physical_cores()})
    parser.add_argument("--threads", nargs="+", type=int, default=counts)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--no-speed", action="store_true", help="only make and judge the files")
    asked = parser.parse_args()
    if unknown := [name for name in asked.models if name not in MODELS]:
        print(f"error: no model {unknown[0]!r}, expected some of {', '.join(MODELS)}", file=sys.stderr)
        return 2
    try:
        reached = [_judged(name, asked) for name in asked.models]
    except ToolkitError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0 if all(reached) else 1


def _judged(name: str, asked: argparse.Namespace) -> bool:
    """Prints a model's tables; whether no bundle misses the aims."""
    usual = ("balanced", f"balanced, {larger_blocks(_checkpoint(name).config.hidden_size)[-1]} but k and v", *LLAMA)
    rows = made(name, asked.files.split(";") if asked.files else usual)
    if asked.no_speed:
        return True
    tools = llama_cpp(ROOT / "build" / "peers")
    run, taken = partial(timed, tools, name, asked.prompt_tokens, asked.new_tokens), list[Turn]()
    for turn in turns(_in_turns(list(rows)), asked.threads, asked.rounds, run):
        print(f"{name}: {turn}", file=sys.stderr, flush=True)
        taken.append(turn)
    text = told(list(rows.values()), taken)
    print(f"\n## {name}\n\n{text}", flush=True)
    return "| missed |" not in text


def _in_turns(files: Sequence[str]) -> list[str]:
    """Bundles and llama.cpp's files by turns, as far as there are both."""
    theirs = [file for file in files if file.startswith("llama.cpp ")]
    ours = [file for file in files if file not in theirs]
    pairs = [file for pair in zip(ours, theirs, strict=False) for file in pair]
    return pairs + [file for file in files if file not in pairs]


if __name__ == "__main__":
    sys.exit(main())
