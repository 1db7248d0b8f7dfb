"""`python -m tests.hostile.kills [--kind K] [--how H] [--every N]`: commands stopped at each event, and gone on with.

Every kind of bundle, calibrated and not, one made again, and a validation; stopped by SIGKILL, SIGTERM, Ctrl-C or a
full disk. Afterwards there is no bundle or a whole one, and the same command again ends in the bytes of one that
nothing happened to, with nothing left beside it. Commands run in forks of one process that has everything imported, so
this needs a POSIX system.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.command_line import called
from tests.hostile.smallest import make_smallest
from tests.hostile.stopped import FULL, HOWS, Events, Stop
from tests.in_process import CALLED_HERE, in_this_process
from toolkit.quality import QUALITIES
from toolkit.target import TARGETS

_LONGEST_S: Final = 120
_CODES: Final = {"kill": -signal.SIGKILL, "term": 143, "interrupt": 130, FULL: 2}
# Dates and seconds.
_NOT_COMPARED: Final = ("report.json", "report.html")
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
        code, said, _ = self._forked(("compile", str(self._out)), Stop(self._root / "none", 1 << 60, "kill"))
        assert code == 0, said
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
        code, said, events = self._forked(trial.words, Stop(self._out.parent, 1 << 60, "kill"))
        assert code in (0, 1), said
        return _content(self._out), events

    def _stopped(self, trial: Trial, stop: Stop, wanted: dict[str, str]) -> str:
        """What is wrong after a stop, or after the same command again; empty if nothing."""
        self._clear(trial.before)
        code, said, _ = self._forked(trial.words, stop)
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
        if self._out.exists() and (problems := self._verified()):
            return f"left a bundle that is not whole: {problems}"
        code, said, _ = self._forked(trial.words, Stop(self._out.parent, 1 << 60, "kill"))
        if code not in (0, 1):
            return f"again, it ended with {code}: {said[-300:]}"
        left = sorted(path.name for path in self._out.parent.iterdir() if path != self._out)
        if left:
            return f"left {left}"
        found = _content(self._out)
        if found != wanted:
            names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            return f"gone on with, {names} are otherwise"
        return ""

    def _verified(self) -> str:
        code, said, _ = self._forked(("verify", str(self._out)), Stop(self._root / "none", 1 << 60, "kill"))
        return "" if code == 0 else said[-200:]

    def _forked(self, words: tuple[str, ...], stop: Stop) -> tuple[int, str, list[str]]:
        """A command in a fork: its exit code, negative for a signal, what it wrote on stderr, and its events."""
        heard, listed = self._root / "stderr", self._root / "events"
        listed.unlink(missing_ok=True)
        sys.stdout.flush()
        child = os.fork()
        if not child:
            self._in_fork(words, stop, heard, listed)
        end = time.monotonic() + _LONGEST_S
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        said = heard.read_text(encoding="utf-8", errors="replace")
        events = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
        return os.waitstatus_to_exitcode(ended[1]), said, events

    def _in_fork(self, words: tuple[str, ...], stop: Stop, heard: Path, listed: Path) -> None:
        """Never returns."""
        from toolkit.cli.commands import main

        _without_children()
        for descriptor, path in ((1, os.devnull), (2, heard)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
        sys.stdout, sys.stderr = (os.fdopen(k, "w", encoding="utf-8") for k in (1, 2))
        sys.argv = ["toolkit", *words]
        code: object = 0
        events = Events(stop)
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException as problem:
            print(f"Traceback: {problem!r} out of main()", file=sys.stderr)
            code = 1
        listed.write_text("\n".join(events.names), encoding="utf-8")
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _without_children() -> None:
    """Calls here what has a process of its own, which would be most of the time; and a compiler that copies."""
    for name in CALLED_HERE:
        setattr(importlib.import_module(name), "run_apart", in_this_process)  # noqa: B010  a stand-in of another type
    setattr(importlib.import_module("toolkit.epcontext.parts"), "run_apart", _compiled)  # noqa: B010
    setattr(importlib.import_module("toolkit.pipeline.compile"), "htp_version", lambda: "0")  # noqa: B010


def _compiled(_: str, job: dict[str, Any], log: Path) -> dict[str, Any]:
    """What the compiler's process leaves and answers: each stage as one EPContext node, and one binary for all."""
    import onnx

    stages, out, bundle = job["stages"], Path(job["out"]), Path(job["bundle"])
    binary = f"{stages[0]}_ctx_qnn.bin"
    log.write_text("compiled\n", encoding="utf-8")
    (out / binary).write_bytes(json.dumps(job["options"], sort_keys=True).encode() * 50)
    for stage in stages:
        model = onnx.load(bundle / f"{stage}.onnx", load_external_data=False)
        graph = model.graph
        given, made = [value.name for value in graph.input], [value.name for value in graph.output]
        attributes: dict[str, Any] = {
            "embed_mode": 0,
            "ep_cache_context": binary,
            "main_context": int(stage == stages[0]),
        }
        node = onnx.helper.make_node("EPContext", given, made, name="ctx", domain="com.microsoft", **attributes)
        whole = onnx.helper.make_graph([node], "compiled", graph.input, graph.output)
        onnx.save(onnx.helper.make_model(whole, opset_imports=model.opset_import), str(out / f"{stage}_ctx.onnx"))
    return {"peak_rss_bytes": 1 << 20}


def _content(bundle: Path) -> dict[str, str]:
    """Every file's SHA-256, but for those with dates and times."""
    files = sorted(path for path in bundle.rglob("*") if path.is_file() and path.name not in _NOT_COMPARED)
    return {path.relative_to(bundle).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    """Runs the trials; exit code 1 says that something was wrong."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kind", action="append", choices=KINDS, default=[])
    options.add_argument("--how", action="append", choices=HOWS, default=[], help="[each in turn]")
    options.add_argument("--every", type=int, default=1, metavar="N", help="every Nth event [1]")
    options.add_argument("--first", type=int, default=1, metavar="N", help="from the Nth event on [1]")
    asked = options.parse_args()
    begin = time.monotonic()
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        trials = Trials(Path(folder))
        for kind in asked.kind or KINDS:
            trials.run(kind, asked.how, asked.every, asked.first)
    for name, count in sorted(trials.counts.items()):
        print(f"{name}: {count}")
    print(f"{trials.counts.total()} stops, {len(trials.wrong)} failed, {time.monotonic() - begin:.0f} s")
    sys.exit(bool(trials.wrong))


if __name__ == "__main__":
    main()
