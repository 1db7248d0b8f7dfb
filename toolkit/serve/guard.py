"""Who may ask: the API key, and against pages of other sites the Host and Origin of every request."""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, quote, urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toolkit.serve.refusal import Refusal

# What is answered without a key: the page itself, which asks for it, and whether the server is up.
_OPEN: Final = ("/", "/health", "/static/")
_LONGEST_TIME: Final = 12
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


# What a browser opens as a page of its own.
REPORTS: Final = "/reports/"
# How long a signed address opens a report.
_SIGNED_S: Final = 24 * 3600


@dataclass(frozen=True)
class Doors:
    """What the server lets in: `hosts` are names that it is reached by, besides localhost and IP addresses."""

    api_key: str | None = None
    hosts: tuple[str, ...] = ()

    def signed(self, path: str) -> str:
        """Returns the address of a path that a browser opens as a page, to which it adds no key: a signature by the
        key, good for a day, stands in it."""
        address = quote(path)
        if self.api_key is None:
            return address
        until = int(time.time()) + _SIGNED_S
        return f"{address}?until={until}&signature={self._signature(path, until)}"

    def is_signed(self, path: str, query: str) -> bool:
        """Whether a query holds a signature of its path that is still good."""
        given = dict(parse_qsl(query))
        until = given.get("until", "")
        if self.api_key is None or not until.isdecimal() or len(until) > _LONGEST_TIME or int(until) < time.time():
            return False
        return hmac.compare_digest(given.get("signature", "").encode(), self._signature(path, int(until)).encode())

    def _signature(self, path: str, until: int) -> str:
        return hmac.new((self.api_key or "").encode(), f"{until} {path}".encode(), "sha256").hexdigest()


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
            self._check_origin(scope["method"], Headers(scope=scope))
            self._check_key(scope["path"], scope["query_string"].decode("latin-1"), Headers(scope=scope))
        except Refusal as refusal:
            await JSONResponse(refusal.body(), refusal.status)(scope, receive, secured)
            return
        await self._app(scope, receive, secured)

    def _check_origin(self, method: str, headers: Headers) -> None:
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

    def _check_key(self, path: str, query: str, headers: Headers) -> None:
        key = self._doors.api_key
        if key is None or path in _OPEN or path.startswith(_OPEN[-1]):
            return
        if not (path.startswith(REPORTS) and self._doors.is_signed(path, query)):
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
