"""`python -m tests.hostile.kills [--kind K] [--how H] [--every N]`: commands stopped at each event, and gone on with.

Every kind of bundle, calibrated and not, one made again, and a validation; stopped by SIGKILL, SIGTERM, Ctrl-C or a
full disk. Afterwards there is no bundle or a whole one, and the same command again ends in the bytes of one that
nothing happened to, with nothing left beside it. Commands run in forks of one process that has everything imported, so
this needs a POSIX system.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.command_line import called
from tests.hostile.forked import Ended, Forked, campaign_folder, content_of
from tests.hostile.smallest import make_smallest
from tests.hostile.stopped import FULL, HOWS, Stop, never
from toolkit.quality import QUALITIES
from toolkit.target import TARGETS

_CODES: Final = {"kill": -signal.SIGKILL, "term": 143, "interrupt": 130, FULL: 2}
# What a bundle of the smallest checkpoint needs said beside its target; `fast` reads no text, which uint16 ranges need.
_CHANGES: Final = {"qnn fast": ("profile=float16",)}
_BUNDLES: Final = {f"{target} {quality}": (target, quality) for target in TARGETS for quality in QUALITIES}
_OTHERS: Final = ("export again", "validate", "validate qnn", "compile", "compile again")
KINDS: Final = (*_BUNDLES, *_OTHERS)


@dataclass(frozen=True)
class Trial:
    """A command that is stopped, and what stands at its place before."""

    words: tuple[str, ...]
    before: Path | None = None


class Trials:
    """Makes what is needed for each kind, stops and goes on, and counts."""

    def __init__(self, root: Path) -> None:
        self._root, self._out = root, root / "place" / "out"
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        make_smallest(root / "checkpoint")
        text = {"text": "the cat and the dog went to the shop, and then the cat ate 345 cakes. " * 8}
        (root / "text.jsonl").write_text((json.dumps(text) + "\n") * 8, encoding="utf-8")

    def run(self, kind: str, hows: list[str], every: int, first: int) -> None:
        """One kind, stopped at each event in each way."""
        trial = self._trial(kind)
        wanted, events = self._whole(trial)
        print(f"{kind}: {len(events)} events", flush=True)
        for k, at in enumerate(range(first, len(events) + 1, every)):
            for how in hows if hows else [HOWS[k % len(HOWS)]]:
                problem = self._stopped(trial, Stop(self._out.parent, at, how), wanted)
                self.counts[f"{kind}, {how}"] += 1
                if problem:
                    line = f"{kind}, {how} at {at} ({events[at - 1]}): {problem}"
                    self.wrong.append(line)
                    print(f"FAILED {line}", flush=True)

    def _trial(self, kind: str) -> Trial:
        """The command of a kind. What runs here once is imported and compiled in every fork."""
        if kind in _BUNDLES:
            return Trial(self._export(*_BUNDLES[kind]))
        bundle = self._made("cpu" if kind in ("export again", "validate") else "qnn", "fast")
        if kind == "export again":
            return Trial((*self._export("cpu", "fast"), "--force"), bundle)
        if kind == "compile":
            return Trial(("compile", str(self._out)), bundle)
        if kind == "compile again":
            return Trial(("compile", str(self._out), "--soc", "x-elite"), self._compiled(bundle))
        options = ("--tokens", "20", "--no-speed", "--no-simulate", "--no-tasks", "--no-baseline")
        return Trial(("validate", str(self._out), "--checkpoint", str(self._root / "checkpoint"), *options), bundle)

    def _compiled(self, bundle: Path) -> Path:
        """A copy of a bundle that has been compiled for its own SoC."""
        self._clear(bundle)
        done = self._done(("compile", str(self._out)))
        assert done.code == 0, done.said
        return Path(shutil.copytree(self._out, bundle.with_name(f"{bundle.name}-compiled"), dirs_exist_ok=True))

    def _export(self, target: str, quality: str) -> tuple[str, ...]:
        window = () if target in ("cpu", "dml") else ("window=32",)
        changes = ("context_length=64", *window, *_CHANGES.get(f"{target} {quality}", ()))
        given = [word for change in changes for word in ("--set", change)]
        if quality != "fast":
            given += ["--calibration", str(self._root / "text.jsonl"), "--set", "calibration_tokens=300"]
        place = ("--checkpoint", str(self._root / "checkpoint"), "--out", str(self._out))
        return ("export", target, *place, "--quality", quality, "--no-validate", "--no-compile", *given)

    def _made(self, target: str, quality: str) -> Path:
        """A bundle made by an export, beside the place of those that are stopped."""
        self._clear(None)
        done = called(*self._export(target, quality))
        assert done.returncode == 0, done.stderr
        return Path(shutil.copytree(self._out, self._root / f"{target}-{quality}", dirs_exist_ok=True))

    def _clear(self, before: Path | None) -> None:
        shutil.rmtree(self._out.parent, ignore_errors=True)
        self._out.parent.mkdir()
        if before:
            shutil.copytree(before, self._out)

    def _whole(self, trial: Trial) -> tuple[dict[str, str], list[str]]:
        """What a run that nothing happens to leaves, and its events."""
        self._clear(trial.before)
        if trial.words[0] == "export":  # what it compiles and finds out, every fork has
            assert called(*trial.words).returncode == 0
            self._clear(trial.before)
        done = self._done(trial.words)
        assert done.code in (0, 1), done.said
        return content_of(self._out), done.events

    def _stopped(self, trial: Trial, stop: Stop, wanted: dict[str, str]) -> str:
        """What is wrong after a stop, or after the same command again; empty if nothing."""
        self._clear(trial.before)
        done = Forked(trial.words, self._root, stop).ended()
        code, said = done.code, done.said
        over = code in (0, 1) and stop.how != "kill"  # it came when all was done, or nothing needed room any more
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        if code != _CODES[stop.how] and not over:
            return f"ended with {code}: {said[-300:]}"
        if stop.how != "kill" and not over and (len(errors) != 1 or said.splitlines()[-1] != errors[0]):
            return f"{len(errors)} error lines: {said[-300:]}"
        if "Traceback" in said:
            return f"a traceback: {said[-300:]}"
        if stop.how == FULL and not over and "free space" not in errors[0]:
            return f"says nothing of a full disk: {errors[0][:300]}"
        if self._out.exists() and (problems := self._verified(trial.words[0])):
            return f"left a bundle that is not whole: {problems}"
        again = self._done(trial.words)
        if again.code not in (0, 1):
            return f"again, it ended with {again.code}: {again.said[-300:]}"
        left = sorted(path.name for path in self._out.parent.iterdir() if path != self._out)
        if left:
            return f"left {left}"
        found = content_of(self._out)
        if found != wanted:
            names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            return f"gone on with, {names} are otherwise"
        return ""

    def _verified(self, command: str) -> str:
        """What `verify` finds wrong; a bundle into which compiled files are being moved has to be said to be one."""
        done = self._done(("verify", str(self._out)))
        told = command == "compile" and done.code == 1 and "compiling it was stopped" in done.said
        return "" if done.code == 0 or told else (done.said + done.printed)[-300:]

    def _done(self, words: tuple[str, ...]) -> Ended:
        """A command that nothing happens to."""
        return Forked(words, self._root, never(self._out.parent)).ended()


def main() -> None:
    """Runs the trials; exit code 1 says that something was wrong."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kind", action="append", choices=KINDS, default=[])
    options.add_argument("--how", action="append", choices=HOWS, default=[], help="[each in turn]")
    options.add_argument("--every", type=int, default=1, metavar="N", help="every Nth event [1]")
    options.add_argument("--first", type=int, default=1, metavar="N", help="from the Nth event on [1]")
    asked = options.parse_args()
    begin = time.monotonic()
    with campaign_folder() as folder:
        trials = Trials(folder)
        for kind in asked.kind or KINDS:
            trials.run(kind, asked.how, asked.every, asked.first)
    for name, count in sorted(trials.counts.items()):
        print(f"{name}: {count}")
    print(f"{trials.counts.total()} stops, {len(trials.wrong)} failed, {time.monotonic() - begin:.0f} s")
    sys.exit(bool(trials.wrong))


if __name__ == "__main__":
    main()
