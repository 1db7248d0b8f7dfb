"""Whether a change left the bytes of bundles as they were: `python -m benchmarks.same_bytes --base COMMIT`.

A set of bundles is made with the toolkit of the base commit and with the one in the working tree. Of each bundle the
SHA-256 of its data files and graphs are compared: settings, manifest and report may differ. The base's digests are
kept in build/same-bytes, and a second comparison with the same base makes half the bundles.

The set is every recipe of tiny-r1 at each quality, stories260k (a Llama with narrow heads and a tied table), each
profile of the Hexagon NPU, and two layers of each distill's true width for every target, with random weights and 4,096
rows of vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
WORK: Final = ROOT / "build" / "same-bytes"
TARGETS: Final = ("cpu", "cpu-split", "dml", "openvino", "qnn", "vitisai", "webgpu")
QUALITIES: Final = ("fast", "balanced", "best")
DISTILLS: Final = ("0528-8b", "1.5b", "14b", "32b", "70b", "7b", "8b")
_NARROW: Final = ("--set", "quantize=[{match: '*', bits: 4, block_size: 32}]")
_COMPARED: Final = (".onnx", ".data")

Digests = dict[str, str]


@dataclass(frozen=True)
class Case:
    """One `toolkit export`: its name here, and its words."""

    name: str
    words: tuple[str, ...]


def cases(work: Path) -> list[Case]:
    """The set. Checkpoints that are not in the tree are written into `work`."""
    tiny = ROOT / "models" / "tiny-r1"
    stories = ROOT / "tests" / "data" / "stories260k"
    found = [
        Case(f"tiny-r1-{target} {quality}", (f"tiny-r1-{target}", "--checkpoint", str(tiny), "--quality", quality))
        for target in TARGETS
        for quality in QUALITIES
    ]
    found += [
        Case(
            f"tiny-r1-qnn {profile} {quality}",
            ("tiny-r1-qnn", "--checkpoint", str(tiny), "--quality", quality, "--set", f"profile={profile}"),
        )
        for profile in ("row-scales", "float16")
        for quality in ("fast", "best")
    ]
    found += [
        Case(f"stories260k {target} {quality}", (target, "--checkpoint", str(stories), "--quality", quality, *_NARROW))
        for target in ("cpu", "cpu-split", "qnn")
        for quality in QUALITIES
    ]
    found.append(Case("tiny-r1-cpu fp32", ("tiny-r1-cpu", "--checkpoint", str(tiny), "--precision", "fp32")))
    for model in DISTILLS:
        shape = _two_layers(model, work)
        asked = ("--checkpoint", str(shape), "--synthetic", "--quality", "fast")
        found += [Case(f"{model} {target}", (target, *asked)) for target in TARGETS]
    return found


def _two_layers(model: str, work: Path) -> Path:
    """A folder with the config of a distill cut to two layers and 4,096 rows of vocabulary."""
    config = json.loads((ROOT / "models" / model / "config.json").read_text(encoding="utf-8"))
    config |= {"num_hidden_layers": 2, "vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 1}
    config.pop("pad_token_id", None)
    folder = work / "shapes" / f"two-layers-of-{model}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def digests_of(tree: Path, python: str, case: Case) -> Digests:
    """The digests of a case's files as the toolkit in `tree` makes them."""
    out = WORK / "bundle"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name("bundle.partial"), ignore_errors=True)
    words = [python, "-m", "toolkit", "export", *case.words, "--out", str(out), "--no-validate", "--no-compile"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{case.name}: {done.stderr.strip().splitlines()[-1:]} from {' '.join(words)}")
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    made = {entry["name"]: entry["sha256"] for entry in manifest["files"] if entry["name"].endswith(_COMPARED)}
    print(f"{case.name}: {len(made)} files", file=sys.stderr, flush=True)
    return made


def base_digests(commit: str, python: str, chosen: str) -> dict[str, Digests]:
    """Those of a commit; cases that were made before come from build/same-bytes."""
    whole = _git("rev-parse", commit)
    kept = WORK / f"{whole}.json"
    found: dict[str, Digests] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    missing = [case for case in cases(WORK) if chosen in case.name and case.name not in found]
    if missing:
        tree = WORK / whole[:12]
        if not tree.is_dir():
            _git("worktree", "add", "--detach", str(tree), whole)
        for case in missing:
            found[case.name] = digests_of(tree, python, case)
            kept.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        _git("worktree", "remove", "--force", str(tree))
    return {name: digests for name, digests in found.items() if chosen in name}


def differences(base: Mapping[str, Digests], now: Mapping[str, Digests]) -> list[str]:
    """One line for each file that is not what it was."""
    found = []
    for case in sorted(base.keys() | now.keys()):
        before, after = base.get(case, {}), now.get(case, {})
        for file in sorted(before.keys() | after.keys()):
            if before.get(file) != after.get(file):
                word = "is new" if file not in before else "is gone" if file not in after else "differs"
                found.append(f"{case}: {file} {word}")
    return found


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def main() -> None:
    """Prints what differs; exit code 1 if anything does."""
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--base", required=True, help="the commit to compare the working tree with")
    parse.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this text")
    given = parse.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    base = base_digests(given.base, sys.executable, given.only)
    chosen = [case for case in cases(WORK) if given.only in case.name]
    now = {case.name: digests_of(ROOT, sys.executable, case) for case in chosen}
    found = differences(base, now)
    print("\n".join(found) or f"{sum(map(len, now.values()))} files of {len(now)} bundles have the same bytes")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
