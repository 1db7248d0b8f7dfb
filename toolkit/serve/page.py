"""The playground's files, and what it asks for beside OpenAI's API: the bundles served, with their reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from toolkit.serve.guard import REPORTS, Doors
from toolkit.serve.refusal import Refusal

_STATIC: Final = Path(__file__).resolve().parent / "static"
_REPORT: Final = "report.html"
# A report is one page with styles inside it; as a sandbox it is of no site, and may ask for nothing.
_REPORT_POLICY: Final = (
    "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
)


def page_routes(
    bundles: Mapping[str, Path], doors: Doors, look_early: Callable[[], None] | None = None
) -> list[BaseRoute]:
    """The routes of the playground over bundles by name; `look_early`, where it offers more to get, is called as a
    browser opens it. Addresses of reports are signed: a browser opens them without the key."""

    async def page(_: Request) -> Response:
        if look_early:
            look_early()
        return FileResponse(_STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    async def listed(_: Request) -> Response:
        rows = [
            {"name": name, "report": doors.signed(REPORTS + name) if (bundle / _REPORT).is_file() else None}
            for name, bundle in bundles.items()
        ]
        return JSONResponse({"bundles": rows, "may_get": look_early is not None})

    async def report(request: Request) -> Response:
        bundle = bundles.get(request.path_params["name"])
        if bundle is None or not (bundle / _REPORT).is_file():
            raise Refusal("no such report", 404)
        return FileResponse(bundle / _REPORT, headers={"Content-Security-Policy": _REPORT_POLICY})

    return [
        Route("/", page),
        Route("/playground/bundles", listed),
        Route(REPORTS + "{name}", report),
        Mount("/static", StaticFiles(directory=_STATIC)),
    ]
