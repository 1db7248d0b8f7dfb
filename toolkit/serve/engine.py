"""One text at a time out of several bundles: a queue with a bound, and the bundle that rested longest makes room."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit.errors import ToolkitError
from toolkit.serve.job import ENDS, FAILED, Event, Job
from toolkit.serve.metrics import Metrics
from toolkit.serve.process import BundleProcess, ProcessEnded


class QueueFull(ToolkitError):
    """More requests wait than the server keeps."""


@dataclass(frozen=True)
class Kept:
    """How much is kept: bundles open at once, requests that may wait."""

    bundles: int = 1
    waiting: int = 16


class Engine:
    """Bundles by name, opened when they are first asked; every text waits for the one before it."""

    def __init__(self, bundles: Mapping[str, Path], kept: Kept, on_cpu: bool = False) -> None:
        self.bundles = dict(bundles)
        self.metrics = Metrics()
        self._kept, self._on_cpu = kept, on_cpu
        # In the order they were last used.
        self._open: dict[str, BundleProcess] = {}
        # Made anew since they were opened.
        self._stale: set[str] = set()
        self._turn = asyncio.Lock()
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def open_names(self) -> list[str]:
        """The bundles that are open now."""
        return [name for name, process in self._open.items() if process.is_running]

    def add(self, bundle: Path) -> str:
        """Serves one bundle more, under its folder's name or one near it, which is returned; one that is served already
        is opened anew when it is asked again."""
        name, k = bundle.resolve().name, 1
        while name in self.bundles and self.bundles[name].resolve() != bundle.resolve():
            k += 1
            name = f"{bundle.resolve().name}-{k}"
        self.bundles[name] = bundle
        if name in self._open:
            self._stale.add(name)
        return name

    def begin(self, name: str, job: Job) -> Texting:
        """Puts a job in the queue of the bundle `name`. Raises QueueFull if too many wait."""
        if len(self._tasks) > self._kept.waiting:
            self.metrics.rejected += 1
            raise QueueFull(f"{len(self._tasks) - 1} requests wait already: ask again in a while")
        texting = Texting(replace(job, number=next(self._numbers)))
        task = texting.waiting = asyncio.create_task(self._run(name, texting))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return texting

    async def close(self) -> None:
        """Stops what is being written, and ends every process."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for process in self._open.values():
            with contextlib.suppress(TimeoutError):
                await process.close()
        self._open.clear()

    async def _run(self, name: str, texting: Texting) -> None:
        last = Event(FAILED, "the server is being stopped")
        self.metrics.deferred += 1
        try:
            async with self._turn:
                texting.waiting = None
                self.metrics.deferred -= 1
                if texting.is_left:
                    return
                self.metrics.processing = 1
                try:
                    last = await self._written(name, texting)
                finally:
                    self.metrics.processing = 0
        except ToolkitError as problem:
            print(f"error: {name}: {problem}", file=sys.stderr)
            last = Event(FAILED, f"the bundle {name} could not be run: see what the server has printed")
        except Exception as problem:
            print(f"error: {name}: {type(problem).__name__}: {problem}", file=sys.stderr)
            last = Event(FAILED, f"a fault of the server, {type(problem).__name__}")
        finally:
            self.metrics.deferred -= texting.waiting is not None
            self.metrics.count(name, last, texting.is_left)
            texting.put(last)

    async def _written(self, name: str, texting: Texting) -> Event:
        # One that died while nobody asked is known to be gone only when it doesn't answer.
        stood = name in self._open
        try:
            return await self._heard(name, texting)
        except ProcessEnded:
            if not stood or texting.has_begun:
                raise
            return await self._heard(name, texting)

    async def _heard(self, name: str, texting: Texting) -> Event:
        process = await self._process(name)
        event = Event(FAILED)
        try:
            async for event in process.events(texting.job):
                if event.kind not in ENDS:
                    texting.put(event)
                if texting.takes_leave():
                    await process.stop(texting.job)
        except BaseException:
            # Its next line would be taken for another job's.
            self._open.pop(name, None)
            await process.close()
            raise
        return event

    async def _process(self, name: str) -> BundleProcess:
        process = self._open.pop(name, None)
        if process and name in self._stale:
            await process.close()
        self._stale.discard(name)
        if process is None or not process.is_running:
            while len(self._open) >= self._kept.bundles:
                oldest = next(iter(self._open))
                await self._open.pop(oldest).close()
            process = await BundleProcess.open(self.bundles[name], self._on_cpu)
            self.metrics.loads += 1
        self._open[name] = process
        return process


class Texting:
    """A text on its way to the client: its events as they come, until the client leaves."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.is_left = False
        # Whether anything of it was written.
        self.has_begun = False
        # The task that waits for its turn, which whoever leaves takes back.
        self.waiting: asyncio.Task[None] | None = None
        self._is_told = False
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    async def events(self) -> AsyncIterator[Event]:
        """The events to the one that ends the text; whoever stops listening has left."""
        try:
            while True:
                event = await self._events.get()
                yield event
                if event.kind in ENDS:
                    return
        finally:
            self.leave()

    def leave(self) -> None:
        """The client no longer wants it: it frees its place in the queue, or ends with the token being written."""
        self.is_left = True
        if self.waiting:
            self.waiting.cancel()

    def takes_leave(self) -> bool:
        """Whether the client has left and the process is still to be told, which is true once."""
        told, self._is_told = self._is_told, self.is_left
        return self.is_left and not told

    def put(self, event: Event) -> None:
        """Hands an event on to whoever listens."""
        self.has_begun = True
        self._events.put_nowait(event)
