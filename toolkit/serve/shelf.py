"""The shelf: what the playground can get, one model at a time, and the routes by which the page asks."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from toolkit import names
from toolkit.serve.body import read_body
from toolkit.serve.engine import Engine
from toolkit.serve.looker import Looker
from toolkit.serve.refusal import Refusal
from toolkit.serve.shelf_event import FAILED, MADE, NOTE, STEP, ShelfEvent
from toolkit.serve.shelf_process import shelf_events
from toolkit.serve.wanted import Look, ShelfJob, Wanted, check_on_hub, read_wanted
from toolkit.typed_json import to_json

GETTING, CANCELLED = "getting", "cancelled"
_MOST_NOTES: Final = 20


@dataclass(frozen=True)
class Getting:
    """How the last model that was asked for is coming: `state` is `getting`, `made`, `failed` or `cancelled`.

    `done` of `total` are steps of the phase, bytes in the phase `download`; `phase_s` is how long it runs. `bundle` is
    the name it is served by once it is made, `problem` the line that says why it is not.
    """

    model: str
    state: str = GETTING
    phase: str = ""
    done: int = 0
    total: int = 0
    phase_s: float = 0.0
    notes: tuple[str, ...] = ()
    bundle: str | None = None
    problem: str | None = None


class Shelf:
    """Models for an engine: bundles are made in a folder and served from then on."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine, self._folder = engine, folder
        self._getting: Getting | None = None
        self._task: asyncio.Task[None] | None = None
        self._phase_began = 0.0
        self._looker = Looker()

    def routes(self) -> list[BaseRoute]:
        """Returns the routes of the page's catalogue."""
        return [
            Route("/playground/catalogue", self._catalogue),
            Route("/playground/get", self._state),
            Route("/playground/get", self._begin, methods=["POST"]),
            Route("/playground/cancel", self._cancel, methods=["POST"]),
            Route("/playground/open", self._open, methods=["POST"]),
        ]

    def look_early(self) -> None:
        """Begins to look at the catalogue before the page asks for it."""
        self._looker.look_early(Look(self._places()))

    async def close(self) -> None:
        """Ends the processes of the shelf."""
        await self._stop_getting()
        await self._looker.close()

    async def _stop_getting(self) -> None:
        if self._task and not self._task.done():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _catalogue(self, request: Request) -> Response:
        """Every recipe and bundle, or with `?hub=owner/name` what that checkpoint would be."""
        hub_id = request.query_params.get("hub")
        look = Look(hub_id=check_on_hub(hub_id)) if hub_id else Look(self._places())
        last = await self._looker.look(look)
        if last.kind == FAILED:
            raise Refusal(last.text)
        return Response(last.text, media_type="application/json")

    async def _state(self, _: Request) -> Response:
        getting = self._getting
        if getting and getting.state == GETTING:
            getting = replace(getting, phase_s=time.monotonic() - self._phase_began)
        return JSONResponse({"getting": to_json(getting)})

    async def _begin(self, request: Request) -> Response:
        wanted = read_wanted(await read_body(request))
        if self._getting and self._getting.state == GETTING:
            raise Refusal(f"{self._getting.model} is being got: wait for it, or cancel it", 409)
        self._getting, self._phase_began = Getting(wanted.model), time.monotonic()
        self._task = asyncio.create_task(self._get(wanted))
        return await self._state(request)

    async def _cancel(self, request: Request) -> Response:
        await read_body(request)
        await self._stop_getting()
        return await self._state(request)

    async def _open(self, request: Request) -> Response:
        """Serves a bundle that lies in the folder already."""
        name = (await read_body(request)).get("name")
        found = next((bundle for bundle in self._made() if bundle.name == name), None)
        if found is None:
            raise Refusal(f"no bundle {name!r:.80} is here: see the catalogue", 404, "name")
        return JSONResponse({"name": self._engine.add(found)})

    def _places(self) -> tuple[str, ...]:
        """Where bundles are looked for: the folder, and each that is served from elsewhere."""
        inside = self._folder.resolve()
        served = self._engine.bundles.values()
        return (str(self._folder), *(str(one) for one in served if not one.resolve().is_relative_to(inside)))

    def _made(self) -> Iterator[Path]:
        return (path.parent for path in self._folder.glob(f"*/{names.GENAI_CONFIG_FILE}"))

    async def _get(self, wanted: Wanted) -> None:
        try:
            async with aclosing(shelf_events(ShelfJob(wanted, str(self._folder)))) as events:
                async for event in events:
                    self._take(event)
        except asyncio.CancelledError:
            self._getting = replace(self._last, state=CANCELLED)
            raise
        except Exception as problem:
            traceback.print_exc()
            problem_line = f"a fault of the server, {type(problem).__name__}: see what it has printed"
            self._getting = replace(self._last, state=FAILED, problem=problem_line)

    @property
    def _last(self) -> Getting:
        assert self._getting is not None
        return self._getting

    def _take(self, event: ShelfEvent) -> None:
        """Learns from an event how far the model is."""
        last = self._last
        if event.kind == STEP:
            if event.text != last.phase:
                self._phase_began = time.monotonic()
            self._getting = replace(last, phase=event.text, done=event.done, total=event.total)
        elif event.kind == NOTE:
            self._getting = replace(last, notes=(*last.notes, event.text)[-_MOST_NOTES:])
        elif event.kind == MADE:
            self._getting = replace(last, state=MADE, bundle=self._engine.add(self._folder / event.text))
        else:
            self._getting = replace(last, state=FAILED, problem=event.text)
