"""The server's side of the process that looks at the catalogue or gets a model: started, listened to and ended."""

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
from toolkit.serve.shelf_event import FAILED, MADE, ROWS, ShelfEvent
from toolkit.serve.wanted import ShelfJob
from toolkit.typed_json import from_json, to_json

# A catalogue of some hundred rows is one line.
_LONGEST_LINE: Final = 8 << 20
_ENDS: Final = frozenset({ROWS, MADE, FAILED})
_TO_END_S: Final = 5.0


async def shelf_events(job: ShelfJob) -> AsyncGenerator[ShelfEvent, None]:
    """Starts a job in a process of its own and yields its events to the one that ends it; whoever closes the iterator
    before ends the process, with all that it has started."""
    process = await asyncio.create_subprocess_exec(
        *python_module("toolkit.serve.shelf_child"),
        json.dumps(to_json(job)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LONGEST_LINE,
        # Nobody watches bars in the server's terminal.
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        while text := await process.stdout.readline():
            event = from_json(ShelfEvent, json.loads(text), "an event")
            yield event
            if event.kind in _ENDS:
                return
        code = await process.wait()
        yield ShelfEvent(FAILED, f"its process ended by itself, exit code {code}: see what the server has printed")
    finally:
        await _ended(process)


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Ends a process and, where the system has groups of processes, those that it has started."""
    with suppress(ProcessLookupError, PermissionError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    with suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), _TO_END_S)
