"""The server's routes: OpenAI's API over bundles, what they are, and how the server does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from toolkit.serve.asked import AskedText, asked_chat, asked_completion, asked_response, check_absent
from toolkit.serve.body import read_body
from toolkit.serve.engine import Engine, QueueFull, Texting
from toolkit.serve.guard import Doors, Guard
from toolkit.serve.job import Job
from toolkit.serve.page import page_routes
from toolkit.serve.refusal import Refusal
from toolkit.serve.replies import ChatReply, CompletionReply, Delta, Object, deltas, whole
from toolkit.serve.response_reply import ResponseReply
from toolkit.serve.shelf import Shelf
from toolkit.typed_json import Json

Reply = ChatReply | CompletionReply | ResponseReply
Result = TypeVar("Result")


class Server:
    """OpenAI's API over the bundles of an engine; with a shelf, models can be got in the playground."""

    def __init__(self, engine: Engine, shelf: Shelf | None = None) -> None:
        self._engine, self._shelf = engine, shelf

    def app(self, doors: Doors) -> Starlette:
        """Returns the ASGI application; the engine is closed as it ends."""
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name}", self._model),
            Route("/v1/chat/completions", self._answering(asked_chat, ChatReply), methods=["POST"]),
            Route("/v1/completions", self._answering(asked_completion, CompletionReply), methods=["POST"]),
            Route("/v1/responses", self._answering(asked_response, ResponseReply), methods=["POST"]),
            *page_routes(self._engine.bundles, doors, self._shelf.look_early if self._shelf else None),
            *(self._shelf.routes() if self._shelf else ()),
        ]

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            if self._shelf and not self._engine.bundles:
                self._shelf.look_early()
            yield
            if self._shelf:
                await self._shelf.close()
            await self._engine.close()

        return Starlette(
            routes=routes,
            lifespan=lifespan,
            middleware=[Middleware(Guard, doors=doors)],
            exception_handlers={Refusal: _refused, HTTPException: _not_found, Exception: _fault},
        )

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _metrics(self, _: Request) -> Response:
        return PlainTextResponse(self._engine.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry(name) for name in self._engine.bundles]})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(self._entry(self._named(request.path_params["name"])))

    def _entry(self, name: str) -> Object:
        is_open = name in self._engine.open_names
        return {"id": name, "object": "model", "created": 0, "owned_by": "toolkit", "is_open": is_open}

    def _named(self, model: str) -> str:
        """The bundle of a request's model; the first where it names none."""
        name = model or next(iter(self._engine.bundles), "")
        if name not in self._engine.bundles:
            raise Refusal(f"no model {name!r:.80} is served: see /v1/models", 404, "model", "model_not_found")
        return name

    def _answering(
        self, read: Callable[[dict[str, Json]], AskedText], reply_of: Callable[[AskedText], Reply]
    ) -> Callable[[Request], Awaitable[Response]]:
        """The route that reads a request and answers it, whole or as events."""

        async def answer(request: Request) -> Response:
            given = await read_body(request)
            check_absent(given)
            asked = read(given)
            asked = replace(asked, model=self._named(asked.model))
            texting = self._begun(asked)
            reply = reply_of(asked)
            if asked.stream:
                parts = deltas(asked, texting.events())
                first = await _unless_left(request, texting, anext(parts))
                return _streamed(reply, _with_first(first, parts), texting)
            made = await _unless_left(request, texting, whole(asked, texting.events()))
            return JSONResponse(reply.whole(made))

        return answer

    def _begun(self, asked: AskedText) -> Texting:
        tools = json.dumps(list(asked.tools.described)) if asked.tools else "[]"
        job = Job(0, asked.options, asked.prompt, json.dumps(list(asked.messages)), tools)
        try:
            return self._engine.begin(asked.model, job)
        except QueueFull as problem:
            raise Refusal(str(problem), 429) from None


async def _unless_left(request: Request, texting: Texting, work: Awaitable[Result]) -> Result:
    """What the work returns; the text is left if the client goes before."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    except BaseException:
        texting.leave()
        raise
    finally:
        for task in (working, gone):
            task.cancel()


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _with_first(first: Delta, rest: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    yield first
    async for delta in rest:
        yield delta


def _streamed(reply: Reply, parts: AsyncIterator[Delta], texting: Texting) -> Response:
    """The answer as server-sent events."""

    async def lines() -> AsyncIterator[bytes]:
        try:
            async for chunk in reply.chunks(parts):
                kind = chunk.get("type")
                yield (f"event: {kind}\n" if kind else "").encode() + _data(chunk)
        except Refusal as refusal:
            yield _data(refusal.body())
        finally:
            texting.leave()
        yield b"data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _data(value: Json) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


async def _refused(_: Request, problem: Exception) -> Response:
    assert isinstance(problem, Refusal)
    return JSONResponse(problem.body(), problem.status)


async def _not_found(_: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    return JSONResponse(Refusal(problem.detail, problem.status_code).body(), problem.status_code)


async def _fault(_: Request, problem: Exception) -> Response:
    return JSONResponse(Refusal("a fault of the server: see what it has printed", 500).body(), 500)
