"""Serves bundles by OpenAI's API, with a playground; the only room that imports starlette and uvicorn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.errors import BundleError, MachineError, RecipeError

_BUILD: Final = Path("build")


def start(
    bundles: Sequence[Path],
    host: str,
    port: int,
    api_key: str | None,
    hosts: Sequence[str],
    keep: int,
    queue: int,
    on_cpu: bool,
    allow_get: bool,
    listens: Callable[[str, str], None],
) -> None:
    """Serves bundles, those in build/ if none is named, until the process is asked to end.

    Models can be got in the page, into build/, where the server is this machine's alone or `allow_get` is true.
    `listens` is told the address and what is served once the server listens. Raises MachineError where the extra
    `serve` is not installed, BundleError for a folder that is no bundle.
    """
    try:
        from toolkit.serve.engine import Kept
        from toolkit.serve.guard import Doors
        from toolkit.serve.run import is_loopback, run_server
    except ImportError as problem:
        package = (problem.name or "").partition(".")[0]
        if package not in ("starlette", "uvicorn", "anyio", "h11"):
            raise
        raise MachineError(
            f'{package} is not installed: pip install "onnx-distill-toolkit[serve]", or starlette and uvicorn'
        ) from None
    doors = Doors(api_key, tuple(name.lower() for name in hosts))
    shelf = _BUILD if allow_get or (is_loopback(host) and not hosts) else None
    run_server(named_bundles(bundles, shelf is None), host, port, doors, Kept(keep, queue), on_cpu, shelf, listens)


def named_bundles(bundles: Sequence[Path], needs_one: bool) -> dict[str, Path]:
    """Bundles by the names of their folders. Raises BundleError for what is none, RecipeError for two of one name."""
    found = bundles or sorted(path.parent for path in _BUILD.glob(f"*/{names.GENAI_CONFIG_FILE}"))
    if not found and needs_one:
        raise RecipeError("no bundle is named, and build/ has none: name a folder that `toolkit export` made")
    named: dict[str, Path] = {}
    for bundle in found:
        if not (bundle / names.GENAI_CONFIG_FILE).is_file():
            raise BundleError(f"{bundle} has no {names.GENAI_CONFIG_FILE}: not a bundle")
        name = bundle.resolve().name
        if name in named:
            raise RecipeError(f"{named[name]} and {bundle} have one name, which clients choose by: rename a folder")
        named[name] = bundle
    return named
