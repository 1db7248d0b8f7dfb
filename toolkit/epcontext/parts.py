"""Every part of a transformer through the compiler, resumable part by part; a child's end is never the parent's.

The work folder holds the finished parts' files, `parts.jsonl` that names them with their hashes, and the compiler's
output of each part.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.apart import ChildFailed, run_apart
from toolkit.epcontext.htp import PACKAGE, PROVIDER
from toolkit.errors import BundleError, MachineError
from toolkit.files import FileEntry, file_entry, file_sha256, write_text
from toolkit.graph.interface import external_bytes, read_interface
from toolkit.machine import free_memory_bytes
from toolkit.partition.parts import compile_memory_bytes
from toolkit.typed_json import from_json, to_json

JOURNAL_FILE: Final = "parts.jsonl"
# As Linux numbers it; Windows has none.
_SIGKILL: Final = 9
_NO_MEMORY: Final = ("MEM_ALLOC", "bad_alloc", "MemoryError", "Cannot allocate memory", "bad allocation")


@dataclass(frozen=True)
class Part:
    """What is compiled together: the stages that share weights, what they are compiled with, and the layers they have.

    `key` changes with anything that the binary is made from.
    """

    index: int
    count: int
    stages: tuple[str, ...]
    options: dict[str, str]
    key: str

    @property
    def log(self) -> str:
        """Returns the name of the file that holds the compiler's output."""
        return f"part_{self.index}.log"


@dataclass(frozen=True)
class CompiledPart:
    """A finished part: its files with bytes and SHA-256, the seconds it took, and the child's peak memory."""

    index: int
    key: str
    files: tuple[FileEntry, ...]
    wall_s: float
    peak_rss_bytes: int


def compile_parts(
    bundle: Path, parts: Sequence[Part], work: Path, progress: Callable[[str], None] = lambda _: None
) -> list[CompiledPart]:
    """Compiles each part in a process of its own; those whose files are whole, in `work` or already in the bundle, are
    kept.

    Raises MachineError if the memory will not do, BundleError if the compiler crashes, refuses a graph, or leaves nodes
    outside EPContext. What was finished stays finished.
    """
    work.mkdir(parents=True, exist_ok=True)
    finished = {entry.index: entry for entry in _read_journal(work)}
    made = []
    for part in parts:
        done = finished.get(part.index)
        if done is None or done.key != part.key or not _is_whole(done, (work, bundle)):
            progress(f"compile part {part.index + 1} of {part.count}")
            done = _compile(bundle, part, work)
            finished[part.index] = done
            _write_journal(work, list(finished.values()))
        made.append(done)
    return made


def part_key(sources: Sequence[str], options: dict[str, str], software: str) -> str:
    """Returns a digest of the SHA-256s of what a part is made from, its options and the compiler."""
    return hashlib.sha256(json.dumps([list(sources), options, software]).encode()).hexdigest()


def _compile(bundle: Path, part: Part, work: Path) -> CompiledPart:
    needed = compile_memory_bytes(external_bytes(bundle / names.stage_file(part.stages[0])))
    if (free := free_memory_bytes()) < needed:
        raise MachineError(
            f"compiling {_name(part)} takes about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} are free: "
            f"{_what_to_do(bundle, part)}"
        )
    fresh, start = work / f"part_{part.index}", time.perf_counter()
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    job = {"bundle": str(bundle), "stages": part.stages, "options": part.options, "out": str(fresh)}
    try:
        peak = run_apart("toolkit.epcontext.child", job, work / part.log)["peak_rss_bytes"]
    except ChildFailed as failed:
        raise _failure(bundle, part, work, failed) from None
    _check_nodes(part, fresh)
    files = [path for path in sorted(fresh.iterdir()) if path.suffix in (".onnx", ".bin")]
    entries = [file_entry(path) for path in files]
    for path in files:
        os.replace(path, work / path.name)
    shutil.rmtree(fresh)
    return CompiledPart(part.index, part.key, tuple(entries), time.perf_counter() - start, peak)


def _check_nodes(part: Part, folder: Path) -> None:
    """Every node of every stage inside EPContext, by counting: a list of providers would prove nothing."""
    for stage in part.stages:
        path = folder / names.compiled_file(stage)
        nodes = read_interface(path).nodes
        outside = [node for node in nodes if node.operator != names.EP_CONTEXT]
        if outside or not nodes:
            what = f"such as {outside[0].name} ({outside[0].operator})" if outside else "and none inside"
            raise BundleError(
                f"{path.name} has {len(outside)} nodes outside EPContext, {what}: {PROVIDER} must take every node of "
                "the transformer, see `toolkit check`"
            )


def _failure(bundle: Path, part: Part, work: Path, failed: ChildFailed) -> MachineError | BundleError:
    """What a child's end means, and what to change."""
    code, last = failed.code, failed.reason
    kept = f"; finished parts are kept, the whole output is in {work / part.log}"
    if code == -_SIGKILL or any(word in failed.output for word in _NO_MEMORY):
        how = "was killed" if code < 0 else f"said {last[:160]!r}"
        return MachineError(
            f"compiling {_name(part)} ran out of memory ({PACKAGE} {how}): {_what_to_do(bundle, part)}{kept}"
        )
    if code < 0:
        return BundleError(
            f"{PACKAGE} crashed compiling {_name(part)} ({signal.Signals(-code).name}), its last words {last[:160]!r}: "
            f"{_what_to_do(bundle, part)}{kept}"
        )
    return BundleError(f"{PACKAGE} did not compile {_name(part)}: {last}{kept}")


def _name(part: Part) -> str:
    return f"part {part.index + 1} of {part.count} ({' and '.join(part.stages)})"


def _what_to_do(bundle: Path, part: Part) -> str:
    return (
        f"close other programs and go on with `toolkit compile {bundle}`, or export again with smaller parts, --set "
        f"parts={2 * part.count}"
    )


def _is_whole(done: CompiledPart, folders: Sequence[Path]) -> bool:
    """Whether each file is in one of the folders with its size and hash."""
    for entry in done.files:
        there = [path for path in (folder / entry.name for folder in folders) if path.is_file()]
        if not any(path.stat().st_size == entry.bytes and file_sha256(path) == entry.sha256 for path in there):
            return False
    return True


def _read_journal(work: Path) -> list[CompiledPart]:
    journal = work / JOURNAL_FILE
    try:
        lines = journal.read_text(encoding="utf-8").splitlines()
        return [from_json(CompiledPart, json.loads(line)) for line in lines]
    except (OSError, ValueError, RecursionError):
        return []


def _write_journal(work: Path, entries: list[CompiledPart]) -> None:
    write_text(work / JOURNAL_FILE, "".join(json.dumps(to_json(entry)) + "\n" for entry in entries))
