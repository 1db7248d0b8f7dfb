"""The server's side of a bundle's process: it is started, told jobs, listened to and ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from toolkit.apart import python_module
from toolkit.errors import BundleError
from toolkit.machine import with_huge_pages
from toolkit.serve.job import ENDS, READY, Event, Job, Told, line
from toolkit.typed_json import from_json

# A line holds the text of the tokens of a moment, with their alternatives.
_LONGEST_LINE: Final = 8 << 20
_TO_END_S: Final = 5.0
# The module that a bundle's process runs.
CHILD: Final = "toolkit.serve.child"


class ProcessEnded(BundleError):
    """A bundle's process ended by itself."""


class BundleProcess:
    """A bundle opened in a process of its own; `open` waits until it can be told jobs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.context_length = 0
        self.load_s = 0.0

    @classmethod
    async def open(cls, bundle: Path, on_cpu: bool) -> BundleProcess:
        """Starts the process. Raises BundleError where the bundle cannot be opened."""
        begun = time.perf_counter()
        words = [str(bundle.resolve()), *(["--on-cpu"] if on_cpu else [])]
        pipe = asyncio.subprocess.PIPE
        opened = cls(
            await asyncio.create_subprocess_exec(
                *python_module(CHILD),
                *words,
                stdin=pipe,
                stdout=pipe,
                limit=_LONGEST_LINE,
                env=with_huge_pages(os.environ),
            )
        )
        try:
            first = await opened._event()
            if first.kind != READY:
                raise BundleError(first.text)
        except BaseException:
            await opened.close()
            raise
        opened.context_length, opened.load_s = int(first.text), time.perf_counter() - begun
        return opened

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.returncode is None

    async def events(self, job: Job) -> AsyncIterator[Event]:
        """Begins a job and yields its events to the one that ends it. Raises ProcessEnded if the process dies."""
        await self._tell(Told(job))
        while True:
            event = await self._event()
            yield event
            if event.kind in ENDS:
                return

    async def stop(self, job: Job) -> None:
        """Lets a job end with the token that is being written."""
        await self._tell(Told(stop=job.number))

    async def close(self) -> None:
        """Ends the process, whatever it does."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await asyncio.wait_for(self._process.wait(), _TO_END_S)

    async def _tell(self, order: Told) -> None:
        stream = self._process.stdin
        assert stream is not None
        try:
            stream.write(line(order))
            await stream.drain()
        except (BrokenPipeError, ConnectionResetError):
            pass  # what comes next is the end of its output

    async def _event(self) -> Event:
        stream = self._process.stdout
        assert stream is not None
        text = await stream.readline()
        if not text:
            code = await self._process.wait()
            print(f"error: the process of a bundle ended by itself, exit code {code}", file=sys.stderr)
            raise ProcessEnded("the process of the bundle ended by itself: ask again, and it is opened anew")
        return from_json(Event, json.loads(text), "an event")
