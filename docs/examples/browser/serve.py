"""Serves this page and a bundle's folder to browsers of this machine: `python serve.py BUNDLE [--port 8000]`.

It sends the two headers without which browsers give WebAssembly no threads; any other server may do the same.
"""

from __future__ import annotations

import argparse
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

HERE = Path(__file__).resolve().parent
HEADERS = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


class Handler(SimpleHTTPRequestHandler):
    """Answers with files beside this one, and below /bundle/ with the bundle's."""

    # Of Windows' registry some machines have other types, which browsers run no module from.
    extensions_map: ClassVar = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *args, bundle: Path, **named) -> None:
        self._bundle = bundle
        super().__init__(*args, **named)

    def translate_path(self, path: str) -> str:
        """Returns the file that an address means; the parent class keeps it inside its folder."""
        path = urlsplit(path).path
        is_bundles = path.startswith("/bundle/")
        self.directory = str(self._bundle if is_bundles else HERE)
        return super().translate_path(path.removeprefix("/bundle") if is_bundles else path)

    def end_headers(self) -> None:
        """Ends the headers of every answer."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *args) -> None:
        """Keeps quiet about what is asked for."""


def main() -> None:
    """Serves until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    if not (options.bundle / "genai_config.json").is_file():
        parser.error(f"{options.bundle} has no genai_config.json: name the folder that `toolkit export` made")
    server = ThreadingHTTPServer(("127.0.0.1", options.port), partial(Handler, bundle=options.bundle))
    print(f"http://127.0.0.1:{server.server_port}/", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
