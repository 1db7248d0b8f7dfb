"""The server's side of the process that looks at the catalogue: started when it is wanted, and asked one look after the
other."""

from __future__ import annotations

import asyncio
import json

from toolkit.serve.shelf_event import FAILED, ShelfEvent
from toolkit.serve.shelf_process import ended, read_event, started
from toolkit.serve.wanted import Look
from toolkit.typed_json import to_json


class Looker:
    """Looks at the catalogue; before the first look its process starts and imports."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._early: asyncio.Task[ShelfEvent] | None = None

    def look_early(self, look: Look) -> None:
        """Looks for nobody, so that who asks soon waits less."""
        is_running = self._process is not None and self._process.returncode is None
        if not is_running and (self._early is None or self._early.done()):
            self._early = asyncio.create_task(self.look(look))

    async def look(self, look: Look) -> ShelfEvent:
        """Returns what a look has found, or why it has not."""
        async with self._turn:
            # One that has waited long for a look has ended by itself.
            found = await self._answer(look) or await self._answer(look)
        return found or ShelfEvent(FAILED, "the process that looks ended by itself: see what the server has printed")

    async def close(self) -> None:
        """Ends the process, whatever it does."""
        if self._early:
            self._early.cancel()
            await asyncio.gather(self._early, return_exceptions=True)
        await self._end()

    async def _answer(self, look: Look) -> ShelfEvent | None:
        """The answer of the process, which is started if there is none; None where it has ended."""
        process = self._process = self._process or await started("toolkit.serve.look_child")
        event = None
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(to_json(look)).encode("ascii") + b"\n")
            await process.stdin.drain()
            event = await read_event(process)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has ended
        finally:
            if event is None:
                # Its next line would be taken for another look's.
                await self._end()
        return event

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process:
            await ended(process)
