"""Who may ask: the API key, and against pages of other sites the Host and Origin of every request."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toolkit.serve.refusal import Refusal

# What is answered without a key: the page itself, which asks for it, and whether the server is up.
_OPEN: Final = ("/", "/health", "/static/")
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# KaTeX places what it draws by style attributes that it sets through the DOM, which a policy allows.
_HEADERS: Final[Mapping[str, str]] = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass(frozen=True)
class Doors:
    """What the server lets in: `hosts` are names that it is reached by, besides localhost and IP addresses."""

    api_key: str | None = None
    hosts: tuple[str, ...] = ()


class Guard:
    """Middleware that answers what may not come in, and puts headers of security on everything that goes out.

    A page of another site can make a browser send requests, and with a name of its own that leads here (DNS rebinding)
    read the answers. A name that the server is not known by is refused, and so is any Origin but the server's own.
    """

    def __init__(self, app: ASGIApp, doors: Doors) -> None:
        self._app, self._doors = app, doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request in, or answers why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = Headers(raw=message["headers"])
                added = {"Content-Security-Policy": _POLICY, **_HEADERS}
                message["headers"] = [
                    *message["headers"],
                    *((k.lower().encode(), v.encode()) for k, v in added.items() if k not in given),
                ]
            await send(message)

        try:
            self._check(scope["path"], scope["method"], Headers(scope=scope))
        except Refusal as refusal:
            await JSONResponse(refusal.body(), refusal.status)(scope, receive, secured)
            return
        await self._app(scope, receive, secured)

    def _check(self, path: str, method: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self._is_known(_name_of(host)):
            raise Refusal("the Host is not this server's: use localhost, its address, or --allow-host", 403)
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise Refusal("the Origin of the request is another site's", 403)
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            raise Refusal("the request comes from another site", 403)
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal("the Content-Type is not application/json", 415)
        key = self._doors.api_key
        if key is not None and not (path in _OPEN or path.startswith(_OPEN[-1])):
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), key.encode()):
                raise Refusal("the API key is missing or wrong: send it as `Authorization: Bearer …`", 401)

    def _is_known(self, name: str) -> bool:
        if name == "localhost" or name in self._doors.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _name_of(host: str) -> str:
    """The name or address of a Host header, in lower case and without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
