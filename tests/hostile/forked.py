"""A command of the toolkit in a fork of this process, which has everything imported: a tenth of the cost of its own."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.hostile.stopped import Events, Stop
from tests.in_process import CALLED_HERE, in_this_process

_LONGEST_S: Final = 120
# What the verbs of these campaigns import when they are called, and what those import when it is needed.
_OF_VERBS: Final = (
    "toolkit.pipeline.check",
    "toolkit.pipeline.compile",
    "toolkit.pipeline.export",
    "toolkit.pipeline.judge",
    "toolkit.report.intact",
    "numba",
    "onnx_ir",
)
# Dates and seconds.
_NOT_COMPARED: Final = ("report.json", "report.html")
_NUMBERS: Final = itertools.count()


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, negative for a signal, what it wrote on stderr and on stdout, its events."""

    code: int
    said: str
    printed: str
    events: list[str]

    @property
    def errors(self) -> list[str]:
        """Its error lines."""
        return [line for line in self.said.splitlines() if line.startswith("error: ")]


class Forked:
    """A command that runs; `stop` may happen to it. Its words are kept in files of `folder` until it has ended."""

    def __init__(self, words: tuple[str, ...], folder: Path, stop: Stop) -> None:
        number = next(_NUMBERS)
        self._files = tuple(folder / f"{name}-{number}" for name in ("stderr", "stdout", "events"))
        sys.stdout.flush()
        self._child = os.fork()
        if not self._child:
            _in_fork(words, stop, *self._files)

    def ended(self) -> Ended:
        """Waits for its end; kills what takes minutes."""
        end = time.monotonic() + _LONGEST_S
        while (ended := os.waitpid(self._child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(self._child, signal.SIGKILL)
            time.sleep(0.005)
        texts = [path.read_text(encoding="utf-8", errors="replace") if path.exists() else "" for path in self._files]
        for path in self._files:
            path.unlink(missing_ok=True)
        said, printed, events = texts
        return Ended(os.waitstatus_to_exitcode(ended[1]), said, printed, events.splitlines())


def content_of(bundle: Path) -> dict[str, str]:
    """The SHA-256 of every file of a bundle, but for those with dates and times."""
    files = sorted(path for path in bundle.rglob("*") if path.is_file() and path.name not in _NOT_COMPARED)
    return {path.relative_to(bundle).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _in_fork(words: tuple[str, ...], stop: Stop, heard: Path, printed: Path, listed: Path) -> None:
    """Never returns."""
    from toolkit.cli.commands import main

    _without_children()
    for descriptor, path in ((1, printed), (2, heard)):
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
    sys.stdout.flush()
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


@contextmanager
def campaign_folder() -> Iterator[Path]:
    """Yields a folder, in memory where there is some, for a campaign of commands with one thread each and no hub, which
    find everything imported."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in _OF_VERBS:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)
