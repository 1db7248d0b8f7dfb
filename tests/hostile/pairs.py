"""`python -m tests.hostile.pairs [--kind K] [--count N] [--seed S]`: two commands on one bundle at the same time.

The second starts at a random moment of the first. Whatever they are, each ends whole or says in one line what it waited
for; afterwards the bundle is the one that one of them makes, `toolkit verify` passes, figures in its report are its
own, and nothing lies beside it. Commands run in forks, so this needs a POSIX system.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Final

from tests.command_line import called
from tests.hostile.forked import Ended, Forked, campaign_folder, content_of
from tests.hostile.smallest import make_smallest
from tests.hostile.stopped import never

# What is done to the bundle, each of words below; and whether a bundle is there before.
KINDS: Final = {
    "export, export": ("export", "export", False),
    "export, another export": ("export", "other", False),
    "export again, validate": ("again", "validate", True),
    "another export, validate": ("other", "validate", True),
    "validate, another export": ("validate", "other", True),
    "validate, validate": ("validate", "validate", True),
    "compile, compile": ("compile", "compile", True),
    "compile, export again": ("compile", "again", True),
    "compile, validate": ("compile", "validate", True),
    "another export, verify": ("other", "verify", True),
    "another export, check": ("other", "check", True),
    "another export, generate": ("other", "generate", True),
    "compile, verify": ("compile", "verify", True),
}
_READERS: Final = ("verify", "check", "generate")
_BUSY: Final = "is being exported, compiled or validated by another process"
# What a reader may say that finds one bundle's files beside another's.
_BETWEEN: Final = ("missing", "not a bundle", "cannot be read", "cannot open", "no such", "does not exist", "changed")


class Pairs:
    """Makes each command's bundle once, then two at a time, and counts."""

    def __init__(self, root: Path) -> None:
        self._root, self._out = root, root / "place" / "out"
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        self._made: dict[tuple[str, str], tuple[Path, float]] = {}
        make_smallest(root / "checkpoint")

    def run(self, kind: str, count: int, seed: int) -> None:
        """`count` pairs of one kind."""
        random = Random(f"{kind} {seed}")
        for _ in range(count):
            problem, what = self._pair(kind, random.random())
            self.counts[f"{kind}: {what}"] += 1
            if problem:
                self.wrong.append(f"{kind}: {problem}")
                print(f"FAILED {self.wrong[-1]}", flush=True)

    def _pair(self, kind: str, moment: float) -> tuple[str, str]:
        """What is wrong, if anything, and how the two ended."""
        first, second, is_there = KINDS[kind]
        target = "qnn" if "compile" in kind else "cpu"
        _, took = self._whole(first, target)
        wanted = [self._whole(name, target)[0] for name in (first, second) if name not in _READERS]
        self._clear(self._whole("export", target)[0] if is_there else None)
        one = Forked(self._words(first, target), self._root, never(self._out.parent))
        time.sleep(moment * took)
        other = Forked(self._words(second, target), self._root, never(self._out.parent))
        ends = {name: run.ended() for name, run in ((f"1 {first}", one), (f"2 {second}", other))}
        told = " and ".join("busy" if _BUSY in end.said else str(end.code) for end in ends.values())
        where = f"at {moment:.3f}, {told}: "
        for name, end in ends.items():
            if problem := _wrong_end(name[2:], end):
                return f"{where}{name}: {problem}", told
        if all(end.code == 2 for end in ends.values()):
            return f"{where}neither did anything", told
        return (where + problem if (problem := self._wrong_bundle(wanted)) else ""), told

    def _wrong_bundle(self, wanted: list[Path]) -> str:
        """What is wrong with the bundle when both have ended: one of `wanted` has to be there."""
        done = Forked(("verify", str(self._out)), self._root, never(self._out.parent)).ended()
        if done.code:
            return f"afterwards verify says {(done.said + done.printed)[-300:]}"
        if left := sorted(path.name for path in self._out.parent.iterdir() if path != self._out):
            return f"left {left}"
        like = [bundle for bundle in wanted if content_of(bundle) == content_of(self._out)]
        if not like:
            return "the bundle is none that either makes alone"
        parity = _figures(self._out)
        if parity is not None and parity not in [_figures(bundle) for bundle in self._validated(like[0])]:
            return f"the report has another bundle's figures: {parity}"
        return ""

    def _validated(self, bundle: Path) -> list[Path]:
        """The bundle with the figures that a validation of it alone finds."""
        place = bundle.with_name(f"{bundle.name}-validated")
        if not place.exists():
            shutil.copytree(bundle, place)
            words = ("validate", str(place), *self._words("validate", "")[2:])
            assert Forked(words, self._root, never(place)).ended().code in (0, 1)
        return [place]

    def _whole(self, name: str, target: str) -> tuple[Path, float]:
        """A copy of the bundle that a command leaves alone, and the seconds that it takes."""
        key = name, target
        if key not in self._made:
            before = None if name == "export" else self._whole("export", target)[0]
            if name == "export":  # what it imports and compiles, every fork has
                self._clear(before)
                assert called(*self._words(name, target)).returncode == 0
            self._clear(before)
            begin = time.monotonic()
            done = Forked(self._words(name, target), self._root, never(self._out.parent)).ended()
            took = time.monotonic() - begin
            assert done.code in (0, 1), done.said
            copy = self._root / f"{name}-{target}"
            self._made[key] = Path(shutil.copytree(self._out, copy)), took
        return self._made[key]

    def _clear(self, before: Path | None) -> None:
        shutil.rmtree(self._out.parent, ignore_errors=True)
        self._out.parent.mkdir()
        if before:
            shutil.copytree(before, self._out)

    def _words(self, name: str, target: str) -> tuple[str, ...]:
        place, checkpoint = str(self._out), str(self._root / "checkpoint")
        window = ("--set", "window=32", "--set", "profile=float16") if target == "qnn" else ()
        made = ("--checkpoint", checkpoint, "--out", place, "--quality", "fast", "--no-validate", "--no-compile")
        export = ("export", target, *made, "--set", "context_length=64", *window)
        few = ("--tokens", "20", "--no-speed", "--no-simulate", "--no-tasks", "--no-baseline")
        return {
            "export": export,
            "again": (*export, "--force"),
            # In eight bits, whose figures are others.
            "other": (*export, "--set", "quantize=[{match: '*', bits: 8, block_size: 32}]", "--force"),
            "validate": ("validate", place, "--checkpoint", checkpoint, *few),
            "compile": ("compile", place),
            "generate": ("generate", place, "--prompt", "the cat", "--max-new-tokens", "2"),
        }.get(name, (name, place))


def _wrong_end(name: str, end: Ended) -> str:
    """What is wrong with how one of the two ended."""
    last = end.said.splitlines()[-1:] or [""]
    if end.code not in (0, 1, 2) or "Traceback" in end.said:
        return f"ended with {end.code}: {end.said[-300:]}"
    if len(end.errors) != (end.code == 2) or (end.errors and end.errors != last):
        return f"exit {end.code} with {len(end.errors)} error lines: {end.said[-300:]}"
    if end.code == 2 and _BUSY not in last[0] and not (name in _READERS and any(word in last[0] for word in _BETWEEN)):
        return f"refused for another reason: {last[0][:300]}"
    return "" if end.code != 1 or name in ("validate", "verify", "check") else f"exit 1: {end.said[-300:]}"


def _figures(bundle: Path) -> tuple[object, ...] | None:
    """What a bundle's report says of its parity, if anything."""
    parity = json.loads((bundle / "report.json").read_text(encoding="utf-8")).get("parity")
    return parity and (parity["mean_kld"], parity["tokens"])


def main() -> None:
    """Runs the pairs; exit code 1 says that something was wrong."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kind", action="append", choices=[*KINDS], default=[])
    options.add_argument("--count", type=int, default=10, help="pairs of each kind [10]")
    options.add_argument("--seed", type=int, default=14)
    asked = options.parse_args()
    begin = time.monotonic()
    with campaign_folder() as folder:
        pairs = Pairs(folder)
        for kind in asked.kind or KINDS:
            pairs.run(kind, asked.count, asked.seed)
    for name, count in sorted(pairs.counts.items()):
        print(f"{name}: {count}")
    print(
        f"{pairs.counts.total()} pairs, {len(pairs.wrong)} failed, {time.monotonic() - begin:.0f} s, seed {asked.seed}"
    )
    sys.exit(bool(pairs.wrong))


if __name__ == "__main__":
    main()
