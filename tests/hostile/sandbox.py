"""A folder with everything that can be damaged, and the oracle for a command that reads it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np
import yaml

from tests.command_line import called
from tests.hostile.parsers import EXPORT, RESUMED, Parser
from tests.hostile.smallest import HIDDEN, TEMPLATE, make_smallest, safetensors, smallest_gguf

# A command that reads a few damaged kilobytes is over in this; the slowest whole one takes a second.
_LONGEST_S: Final = 20.0
_MOST_MEMORY_BYTES: Final = 1 << 30
_LONGEST_LINE: Final = 1100
_RECIPE: Final = {
    "name": "smallest-cpu",
    "model": "checkpoint",
    "target": "cpu",
    "context_length": 64,
    "quality": "fast",
    "quantize": [
        {"match": "lm_head|model.embed_tokens", "bits": 8, "block_size": 32, "algorithm": "rtn", "symmetric": False},
        {"match": "*", "bits": 4, "block_size": 32, "algorithm": "auto"},
    ],
    "validate": {"mean_kld": 0.5},
    "tasks": [],
    "baseline": False,
    "fold": True,
    "bits_per_weight": 0,
}
_PIPELINE: Final = (
    *("export", "qnn", "--checkpoint", "{checkpoint}", "--out", "{pipeline}", "--no-validate", "--no-compile"),
    *("--quality", "fast", "--set", "profile=float16", "--set", "context_length=64", "--set", "window=32"),
)


@dataclass(frozen=True)
class Outcome:
    """How a command took a mutant: `accepted`, `refused`, or `failed` with what is wrong about it."""

    kind: str
    why: str = ""


class KilledError(BaseException):
    """What stands for a kill where a process would be too much."""


class Sandbox:
    """The pieces by name, made once; a mutant takes one file's place, and everything is put back after it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seen = _Watch(root)
        self._peak_bytes = peak_bytes()

    def make(self) -> None:
        """Makes every piece, and a copy of those that commands may change."""
        make_smallest(self.root / "checkpoint")
        (self.root / "tmp").mkdir()
        _make_adapter(self.root / "adapter")
        smallest_gguf().write(self.root / "model.gguf")
        (self.root / "recipe.yaml").write_text(yaml.safe_dump(_RECIPE, sort_keys=False), encoding="utf-8")
        (self.root / "template").write_text(TEMPLATE, encoding="utf-8")
        task = {"question": "the 3 and 4", "answer": "7", "checker": "number"}
        (self.root / "task.jsonl").write_text(json.dumps(task) + "\n", encoding="utf-8")
        text = {"text": "the cat and the dog went to the shop, and then the cat ate 345 cakes. " * 8}
        (self.root / "text.jsonl").write_text((json.dumps(text) + "\n") * 8, encoding="utf-8")
        self._done(EXPORT)
        (self.root / "out").rename(self.root / "bundle")
        self._done(_PIPELINE)
        with mock.patch("toolkit.pipeline.export.put_in_place", side_effect=KilledError), _passing(KilledError):
            done = called(*self.words(RESUMED))
            raise AssertionError(f"not killed: {done.stderr}")
        for name in ("bundle", "pipeline", "out.partial"):
            shutil.copytree(self.root / name, self.root / "whole" / name)
        shutil.rmtree(self.root / "out.partial")

    def words(self, command: tuple[str, ...], value: str = "") -> list[str]:
        """A command with its places in the sandbox filled in."""
        paths = {name: self.root / name for name in ("checkpoint", "adapter", "bundle", "pipeline", "out")}
        files = {
            "recipe": self.root / "recipe.yaml",
            "gguf": self.root / "model.gguf",
            "task": self.root / "task.jsonl",
            "text": self.root / "text.jsonl",
        }
        filled = {f"{{{name}}}": str(path) for name, path in {**paths, **files}.items()} | {"{value}": value}
        return [filled.get(word, word) for word in command]

    def original(self, file: str) -> bytes:
        """The content of one of a parser's files as it was made."""
        whole = self.root / "whole" / file
        return (whole if whole.exists() else self.root / self._source(file)).read_bytes()

    def names(self, pattern: str) -> list[str]:
        """The files that a parser's pattern means."""
        if "*" not in pattern:
            return [pattern]
        found = (self.root / "whole").glob(pattern + "*/*" if pattern.endswith("/*") else pattern)
        return sorted(path.relative_to(self.root / "whole").as_posix() for path in found if path.is_file())

    def tried(self, parser: Parser, mutant: Mapping[str, Any]) -> Outcome:
        """Puts a mutant in its place, runs each command, judges it, and puts everything back."""
        self._lay_out(parser)
        file, value = mutant.get("file", ""), mutant.get("value", "")
        place, content = self.root / file, None
        if file:
            content = place.read_bytes() if place.is_file() else None
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            place.write_bytes(mutant["content"])
        try:
            found = [self.judged(command, value) for command in parser.commands]
        finally:
            self._put_back(parser, place if file else None, content)
        failed = [outcome for outcome in found if outcome.kind == "failed"]
        return failed[0] if failed else min(found, key=lambda outcome: outcome.kind)

    def _source(self, file: str) -> str:
        """Where the original lies of a file that is made by a command, or is not there at first."""
        if file == "out/report.json":
            return "bundle/report.json"
        return "template" if file.endswith("chat_template.jinja") else file

    def _lay_out(self, parser: Parser) -> None:
        if parser.on == "out.partial":
            shutil.copytree(self.root / "whole" / "out.partial", self.root / "out.partial")
        elif parser.files == ("out/report.json",):
            shutil.copytree(self.root / "whole" / "bundle", self.root / "out")

    def _put_back(self, parser: Parser, place: Path | None, content: bytes | None) -> None:
        if place is not None and place.exists():
            place.unlink()
            if content is not None:
                place.write_bytes(content)
        if parser.on in ("bundle", "pipeline"):
            shutil.rmtree(self.root / parser.on)
            shutil.copytree(self.root / "whole" / parser.on, self.root / parser.on)
            shutil.rmtree(self.root / f"{parser.on}.compile", ignore_errors=True)
        self.cleared()

    def cleared(self) -> None:
        """Removes what exports made and left."""
        for path in self.root.iterdir():
            if path.name.startswith(("out", ".out")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _done(self, command: tuple[str, ...]) -> None:
        done = called(*self.words(command))
        assert done.returncode == 0, done.stderr

    def judged(self, command: tuple[str, ...], value: str = "") -> Outcome:
        """Runs a command and says what is wrong about its end, if anything."""
        begin = time.monotonic()
        with self.seen.watching():
            try:
                done = called(*self.words(command, value))
            except BaseException as problem:
                return Outcome("failed", f"{command[0]}: {type(problem).__name__} out of main(): {problem!s:.200}")
        took, before = time.monotonic() - begin, self._peak_bytes
        self._peak_bytes = peak_bytes()
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        said = errors[-1] if errors else lines[-1] if lines else ""
        wrong = ""
        if done.returncode not in (0, 1, 2):
            wrong = f"exit {done.returncode}"
        elif "Traceback" in done.stderr:
            wrong = "a traceback"
        elif (done.returncode == 2) != bool(errors) or len(errors) > 1 or (errors and errors[0] != lines[-1]):
            wrong = f"exit {done.returncode} with {len(errors)} error lines"
        elif max(map(len, lines), default=0) > _LONGEST_LINE:
            wrong = f"a line of {max(map(len, lines))} characters"
        elif self.seen.outside:
            wrong = f"wrote {self.seen.outside[0]}"
        elif took > _LONGEST_S:
            wrong = f"{took:.0f} s"
        elif self._peak_bytes - before > _MOST_MEMORY_BYTES:
            wrong = f"{(self._peak_bytes - before) >> 20} MiB more memory"
        elif done.returncode == 0 and command[0] == "export" and "--dry-run" not in command:
            verified = called("verify", str(self.root / "out"))
            wrong = (
                "" if verified.returncode == 0 else f"exit 0, and verify says {verified.stdout[:200]}{verified.stderr}"
            )
        if wrong:
            return Outcome("failed", f"{command[0]}: {wrong}: {said[:400]}")
        return Outcome("refused" if done.returncode == 2 else "accepted", said[:200])


class _Watch:
    """What the process writes where it should not, by Python's audit events."""

    _WRITES: Final = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")

    def __init__(self, root: Path) -> None:
        # What a command may write: its bundle with what lies beside it, the compiler's folder, temporary files.
        described = ("bundle/report", "bundle/README.md", "bundle/manifest.json")
        self._allowed = tuple(str(root / name) for name in ("out", ".out", "tmp", "pipeline", ".bundle-", *described))
        self._on = False
        self.outside: list[str] = []
        sys.addaudithook(self._seen)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches meanwhile; `outside` has what was seen."""
        self.outside, self._on = [], True
        try:
            yield
        finally:
            self._on = False

    def _seen(self, event: str, given: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event == "open" and isinstance(given[0], str | bytes | os.PathLike):
            mode, flags = given[1], given[2]
            writes = any(sign in mode for sign in "wax+") if isinstance(mode, str) else bool(flags & 3)
            self._check(given[0], "opened for writing") if writes else None
        elif event in self._WRITES and not (isinstance(given[-1], int) and given[-1] >= 0):
            # The first path of a link is where it points to.
            self._check(given[1 if event in ("os.link", "os.symlink") else 0], event)

    def _check(self, path: Any, event: str) -> None:
        if isinstance(path, int):
            return
        full = os.path.abspath(os.fsdecode(path))
        if not full.startswith(self._allowed) and "__pycache__" not in full and full != os.devnull:
            self.outside.append(f"{event}: {full}")


def _make_adapter(folder: Path) -> None:
    """A LoRA adapter of rank 2 for one matrix, as PEFT writes it."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj"]}
    settings |= {"alpha_pattern": {"k_proj": 2}, "use_rslora": False, "fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {"lora_A": np.ones((2, HIDDEN)), "lora_B": np.ones((HIDDEN, 2))}
    tensors = {f"{module}.{side}.weight": values for side, values in factors.items()}
    (folder / "adapter_model.safetensors").write_bytes(safetensors(tensors))


@contextmanager
def _passing(kind: type[BaseException]) -> Iterator[None]:
    try:
        yield
    except kind:
        return


def peak_bytes() -> int:
    """The most memory that the process has had so far, 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
