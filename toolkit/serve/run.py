"""Runs the server until it is stopped, in the middle of an answer too."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Final

import uvicorn

from toolkit.errors import MachineError, RecipeError
from toolkit.serve.app import Server
from toolkit.serve.engine import Engine, Kept
from toolkit.serve.guard import Doors
from toolkit.serve.shelf import Shelf

_GRACE_S: Final = 3
_IDLE_S: Final = 15
_MOST_CONNECTIONS: Final = 256


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Stopping(uvicorn.Server):
    """A server that ends its answers before it waits for them."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stops what is being written as well as the server."""
        super().handle_exit(sig, frame)
        asyncio.get_running_loop().create_task(self._engine.close())


def run_server(
    bundles: Mapping[str, Path],
    host: str,
    port: int,
    doors: Doors,
    kept: Kept,
    on_cpu: bool,
    shelf: Path | None,
    listens: Callable[[str, str], None],
) -> None:
    """Serves until a signal comes; `listens` is told the address and what is served once it does. `shelf` is the folder
    for bundles of models that are got in the page, None where none may be.

    Raises RecipeError for a host beyond loopback without a key, MachineError where it cannot listen.
    """
    if doors.api_key is None and not is_loopback(host):
        raise RecipeError(f"--host {host} is beyond this machine: give an --api-key, without which anyone could ask")
    listening = _listening(host, port)
    engine = Engine(bundles, kept, on_cpu)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        Server(engine, None if shelf is None else Shelf(engine, shelf)).app(doors),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        timeout_graceful_shutdown=_GRACE_S,
        timeout_keep_alive=_IDLE_S,
        limit_concurrency=_MOST_CONNECTIONS,
        h11_max_incomplete_event_size=64 << 10,
        ws="none",
    )
    served = ", ".join(bundles) or "no bundle yet, the page gets one"
    shown = f"[{host}]" if ":" in host else host
    listens(f"http://{shown}:{listening.getsockname()[1]}/", served)
    with listening:
        _Stopping(config, engine).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises MachineError where the system refuses."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as problem:
        raise MachineError(f"cannot listen on {host} port {port}: {problem.strerror}: choose another --port") from None
    return listening
