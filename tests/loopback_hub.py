"""A hub of our own on loopback, as far as huggingface_hub asks it."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/some-model"


class Hub(ThreadingHTTPServer):
    """Serves one folder as the repository `REPO`; the first answer with weights breaks off in the middle, and while the
    gate is closed each waits there."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder = folder
        self.requests: list[tuple[str, str, str | None]] = []
        self.broken = self.mended = False
        self.gate = threading.Event()
        self.gate.set()
        self.sent: dict[str, int] = {}


class HubHandler(BaseHTTPRequestHandler):
    """What a snapshot download asks for: the list of files in either form, a file's head, a file from some byte on."""

    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, wanted))
        if self.path.startswith(f"/api/models/{REPO}/tree/"):  # where huggingface_hub lists files from 1.0 on
            files = sorted(self.server.folder.iterdir())
            tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": COMMIT} for p in files]
            self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
            return
        if self.path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": path.name} for path in sorted(self.server.folder.iterdir())]
            text = json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings, "tags": ["license:mit"]}).encode()
            known = self.path.rsplit("/", 1)[-1] in ("some-model", "main", "v1", COMMIT)
            failed = {"X-Error-Code": "RevisionNotFound", "Content-Type": "application/json"}
            self._send(200 if known else 404, text, {"Content-Type": "application/json"} if known else failed, body)
            return
        path = self.server.folder / self.path.rsplit("/", 1)[-1]
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            return
        data = path.read_bytes()
        first, _, last = wanted.removeprefix("bytes=").partition("-") if wanted else ("0", "", "")
        start, stop = int(first), min(int(last) + 1, len(data)) if last else len(data)
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        weights = body and not last and path.suffix == ".safetensors"
        if weights and self.server.broken and not self.server.mended:
            self._send(403, b"", {}, body)  # huggingface_hub 2 resumes by itself, and would hide the break
            return
        self.server.sent[path.name] = self.server.sent.get(path.name, 0) + body * (stop - start)
        breaks = weights and not self.server.broken
        self.server.broken |= breaks
        self._send(206 if wanted else 200, data[start:stop], headers, body, breaks, weights)

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], body: bool, breaks: bool = False, waits: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            half = len(data) // 2 if breaks or waits else len(data)
            with suppress(ConnectionError):  # whoever asked has left
                self.wfile.write(data[:half])
                self.wfile.flush()
                self.server.gate.wait(60)
                self.wfile.write(b"" if breaks else data[half:])
        if breaks:
            self.close_connection = True


@contextmanager
def loopback_hub(folder: Path) -> Iterator[Hub]:
    """A hub that serves a folder, until the block ends."""
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def hub_environment(hub: Hub, home: Path, offline: str = "0") -> dict[str, str]:
    """The environment in which huggingface_hub asks this hub and keeps its cache in a folder."""
    return {
        **os.environ,
        "HF_HOME": str(home),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
