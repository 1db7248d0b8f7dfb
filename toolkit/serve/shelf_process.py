"""Processes of the shelf: they are started, listened to, and ended with all that they have started."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Final

from toolkit.apart import python_module
from toolkit.serve.shelf_event import ENDS, FAILED, ShelfEvent
from toolkit.serve.wanted import ShelfJob
from toolkit.typed_json import from_json, to_json

# A catalogue of some hundred rows is one line.
_LONGEST_LINE: Final = 8 << 20
_TO_END_S: Final = 5.0


async def started(module: str, *words: str) -> asyncio.subprocess.Process:
    """Starts a module in a process, and a group, of its own, with a pipe to it and from it."""
    return await asyncio.create_subprocess_exec(
        *python_module(module),
        *words,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LONGEST_LINE,
        # Nobody watches bars in the server's terminal.
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        start_new_session=True,
    )


async def read_event(process: asyncio.subprocess.Process) -> ShelfEvent | None:
    """Returns the next event that a process tells; None once it has ended."""
    assert process.stdout is not None
    text = await process.stdout.readline()
    return from_json(ShelfEvent, json.loads(text), "an event") if text else None


async def shelf_events(job: ShelfJob) -> AsyncGenerator[ShelfEvent, None]:
    """Starts a job in a process of its own and yields its events to the one that ends it; whoever closes the iterator
    before ends the process."""
    process = await started("toolkit.serve.shelf_child", json.dumps(to_json(job)))
    try:
        while event := await read_event(process):
            yield event
            if event.kind in ENDS:
                return
        code = await process.wait()
        yield ShelfEvent(FAILED, f"its process ended by itself, exit code {code}: see what the server has printed")
    finally:
        await ended(process)


async def ended(process: asyncio.subprocess.Process) -> None:
    """Ends a process and, where the system has groups of processes, those that it has started."""
    with suppress(ProcessLookupError, PermissionError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    with suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), _TO_END_S)
