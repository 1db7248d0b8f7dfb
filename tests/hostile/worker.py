"""Tries mutants of one parser, one after the other in this process, and says of each what became of it, a line each.

Children that the toolkit starts for native code are called in this process instead, the machine's speed is measured
once, and nothing is synced: that makes a mutant hundredths of a second. The campaign sees if this process dies, hangs
or takes memory without bound.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final
from unittest import mock

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.hostile.headers import damaged_gguf, damaged_header, safetensors_header, with_header
from tests.hostile.mutants import damaged_bytes, damaged_json, damaged_yaml
from tests.hostile.parsers import PARSERS, Parser
from tests.hostile.sandbox import Outcome, Sandbox, peak_bytes
from tests.in_process import CALLED_HERE, in_this_process
from toolkit.apart import ChildFailed

_MOST_ADDRESSES: Final = 24 << 30


def tried(names: list[str], sandbox: Sandbox, number: int, count: int, say: Callable[[dict[str, Any]], None]) -> None:
    """Tries `count` mutants of each parser, those that the seed `number` makes."""
    for name in names:
        parser = next(parser for parser in PARSERS if parser.name == name)
        if parser.form != "bytes" and number % 2:
            _structures(parser, sandbox, number, count, say)
        else:
            for k in range(count):
                _say(parser, sandbox, _damaged(parser, sandbox, Random(f"{name} {number} {k}")), say)


def _damaged(parser: Parser, sandbox: Sandbox, random: Random) -> dict[str, Any]:
    """A mutant with bytes changed, in a file's header more often than behind it."""
    if parser.words:
        text = random.choice(parser.words).encode()
        made = random.choice((damaged_bytes, damaged_yaml))(text, random)
        # What a command line can hold: no zero byte.
        return {"value": made.replace(b"\x00", b"").decode("utf-8", "surrogateescape")}
    file = random.choice([name for pattern in parser.files for name in sandbox.names(pattern)])
    whole = sandbox.original(file)
    if parser.form in ("safetensors", "gguf") and random.random() < 0.75:
        return {"file": file, "content": damaged_header(parser.form, whole, random)}
    damage = random.choice((damaged_bytes, damaged_yaml)) if file.endswith(".yaml") else damaged_bytes
    return {"file": file, "content": damage(whole, random)}


def _structures(
    parser: Parser, sandbox: Sandbox, number: int, count: int, say: Callable[[dict[str, Any]], None]
) -> None:
    """Mutants with places changed of the parser's documents, most of them Hypothesis' own examples."""
    if parser.form == "gguf":
        for k in range(count):
            made = damaged_gguf(Random(f"{parser.name} {number} {k}"))
            _say(parser, sandbox, {"file": parser.files[0], "content": made}, say)
        return
    file = Random(number).choice(parser.files)
    whole = sandbox.original(file)

    def one(content: bytes) -> None:
        made = with_header(whole, content) if parser.form == "safetensors" else content
        _say(parser, sandbox, {"file": file, "content": made}, say)

    plan = settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    seed(number)(plan(given(damaged_json(_document(parser, file, whole)))(one)))()


def _document(parser: Parser, file: str, whole: bytes) -> Any:
    """What a file says. YAML is a superset of JSON, lines hold it too."""
    if parser.form == "safetensors":
        return safetensors_header(whole)
    text = whole.decode("utf-8")
    if file.endswith(".yaml"):
        import yaml

        return yaml.safe_load(text)
    return json.loads(text.splitlines()[0] if file.endswith(".jsonl") else text)


def _say(parser: Parser, sandbox: Sandbox, mutant: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    kept = dict(mutant)
    if "content" in kept:
        kept["content"] = base64.b64encode(kept["content"]).decode()
    say({"parser": parser.name, "mutant": kept})
    try:
        outcome = sandbox.tried(parser, mutant)
    except Exception:
        outcome = Outcome("failed", "the campaign itself: " + traceback.format_exc()[-600:])
    say({"kind": outcome.kind, "why": outcome.why})


@contextmanager
def cheap() -> Iterator[None]:
    """What makes a command cheap, and nothing that it reads otherwise."""
    import toolkit.machine
    import toolkit.pipeline.work
    import toolkit.typed_json

    with ExitStack() as stack:
        # Before others import them by name.
        for module, name in (
            (toolkit.machine, "package_versions"),
            (toolkit.pipeline.work, "measure_speed"),
            (toolkit.typed_json, "field_kinds"),
        ):
            stack.enter_context(mock.patch.object(module, name, cache(getattr(module, name))))
        for module_name in CALLED_HERE:
            importlib.import_module(module_name)
            stack.enter_context(mock.patch(f"{module_name}.run_apart", in_this_process))
        stack.enter_context(mock.patch("toolkit.evaluate.renders._bound_memory"))
        importlib.import_module("toolkit.epcontext.parts")
        stack.enter_context(mock.patch("toolkit.epcontext.parts.run_apart", _no_compiler))
        stack.enter_context(mock.patch("toolkit.pipeline.compile.htp_version", lambda: "0"))
        stack.enter_context(mock.patch("os.fsync"))
        yield


def _no_compiler(*_: object, **__: object) -> Any:
    raise ChildFailed(1, "error: the campaign has no compiler")


def main() -> None:
    """`python -m tests.hostile.worker FOLDER JOB…`; a job is `PARSERS SEED COUNT`, and outcomes go to stdout."""
    root = Path(sys.argv[1])
    os.environ["HF_HUB_OFFLINE"] = "1"
    tempfile.tempdir = os.environ["TMPDIR"] = str(root / "tmp")
    _bound_memory()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What native code prints is none of the lines that are read.
    with (root.parent / f"{root.name}.log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

    def say(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    with cheap():
        sandbox = Sandbox(root)
        if not (root / "whole").is_dir():
            root.mkdir(parents=True, exist_ok=True)
            sandbox.make()
        say({"ready": True})
        for line in sys.stdin:
            job = json.loads(line)
            if "repeat" in job:
                mutant = job["repeat"]["mutant"]
                if "content" in mutant:
                    mutant["content"] = base64.b64decode(mutant["content"])
                parser = next(parser for parser in PARSERS if parser.name == job["repeat"]["parser"])
                _say(parser, sandbox, mutant, say)
            else:
                tried([job["parser"]], sandbox, job["seed"], job["count"], say)
            say({"done": True, "cpu_s": time.process_time(), "peak_bytes": peak_bytes()})


def _bound_memory() -> None:
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MOST_ADDRESSES, _MOST_ADDRESSES))


if __name__ == "__main__":
    main()
