"""The playground's files, and what it asks for beside OpenAI's API: the bundles with their reports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

FOLDER: Final = Path(__file__).resolve().parent / "static"


def page_routes(bundles: Mapping[str, Path]) -> list[BaseRoute]:
    """The routes of the playground over bundles by name."""

    async def page(_: Request) -> Response:
        return FileResponse(FOLDER / "index.html")

    return [Route("/", page), Mount("/static", StaticFiles(directory=FOLDER))]
