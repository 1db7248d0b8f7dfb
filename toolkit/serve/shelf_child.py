"""The process that downloads and converts one model: that would hold up the server's answers, and whoever cancels ends
the process, from whose journal the next one goes on."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from toolkit import library
from toolkit.checkpoint.download import downloaded_bytes, hub_file, is_hub_id, resolve_checkpoint
from toolkit.checkpoint.remote import open_headers
from toolkit.errors import ToolkitError
from toolkit.pipeline.get import choose_target
from toolkit.progress import FinishedStep
from toolkit.recipe import load_recipe
from toolkit.serve.refusal import without_paths
from toolkit.serve.shelf_event import DOWNLOAD, FAILED, MADE, NOTE, STEP, ShelfEvent, event_line
from toolkit.serve.wanted import ShelfJob, Wanted
from toolkit.typed_json import from_json

_OFTEN_S: Final = 0.1


@dataclass
class _Out:
    """Where events go: the stdout this process began with. Steps that come too fast to be read are left out."""

    stream: BinaryIO
    phase: str = ""
    at: float = 0.0

    def say(self, event: ShelfEvent) -> None:
        """Writes an event out at once, a line of its own."""
        self.stream.write(event_line(event))
        self.stream.flush()

    def note(self, text: str) -> None:
        """Says a line that a user should read."""
        self.say(ShelfEvent(NOTE, without_paths(text)))

    def step(self, name: str) -> None:
        """Says how far a phase of the export is."""
        step = name if isinstance(name, FinishedStep) else FinishedStep(name, str(name))
        self.told(step.phase, step.done, step.total)

    def told(self, phase: str, done: int, total: int) -> None:
        """Says how far a phase is, unless that was said a moment ago."""
        now = time.monotonic()
        if phase != self.phase or done == total or now - self.at > _OFTEN_S:
            self.phase, self.at = phase, now
            self.say(ShelfEvent(STEP, phase, done, total))


def _get(wanted: Wanted, folder: Path, out: _Out) -> ShelfEvent:
    chosen = choose_target(wanted.model, wanted.target)
    out.note(f"{chosen.target}: {chosen.why}")
    recipe = load_recipe(chosen.recipe, (), chosen.checkpoint)
    _download(chosen.checkpoint or recipe.model, out)
    plans = library.plan(
        chosen.recipe, checkpoint=chosen.checkpoint, out=folder / recipe.name, quality=wanted.quality, note=out.note
    )
    (bundle,) = library.export(plans, progress=out.step, note=out.note)
    return ShelfEvent(MADE, bundle.name)


def _download(place: str, out: _Out) -> None:
    """Downloads a checkpoint of the hub, and says how many of its bytes are here."""
    if not (is_hub_id(place) or hub_file(place)):
        return
    opened = open_headers(place)
    if opened.download_bytes:
        files = [opened.folder / origin.name for origin in opened.source.identity()]
        with _watched(place, files, opened.download_bytes, out):
            resolve_checkpoint(place)


@contextmanager
def _watched(place: str, files: list[Path], total: int, out: _Out) -> Iterator[None]:
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_OFTEN_S):
            out.told(DOWNLOAD, min(downloaded_bytes(place, files), total), total)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def _end_with_the_server() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """In the child: does the job of its argument, and says on stdout how it goes."""
    out = _Out(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    job = from_json(ShelfJob, json.loads(sys.argv[1]), "the job")
    try:
        last = _get(job.get, Path(job.folder), out)
    except ToolkitError as problem:
        last = ShelfEvent(FAILED, without_paths(" ".join(str(problem).split())))
    except Exception as problem:
        traceback.print_exc()
        last = ShelfEvent(FAILED, f"a fault of the toolkit, {type(problem).__name__}: see what the server has printed")
    out.say(last)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
