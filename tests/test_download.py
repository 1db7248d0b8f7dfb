"""A hub id through huggingface_hub, from a hub of our own on loopback: whole, resumed after a break, and offline."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.random_models import make_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/some-model"


class Hub(ThreadingHTTPServer):
    """Serves one folder as the repository `REPO`; the first answer with weights breaks off in the middle."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder = folder
        self.requests: list[tuple[str, str, str | None]] = []
        self.broken = self.mended = False


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
            text = json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()
            self._send(200, text, {"Content-Type": "application/json"}, body)
            return
        path = self.server.folder / self.path.rsplit("/", 1)[-1]
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            return
        data = path.read_bytes()
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        weights = body and path.suffix == ".safetensors"
        if weights and self.server.broken and not self.server.mended:
            self._send(403, b"", {}, body)  # huggingface_hub 2 resumes by itself, and would hide the break
            return
        breaks = weights and not self.server.broken
        self.server.broken |= breaks
        self._send(206 if wanted else 200, data[start:], headers, body, breaks)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool, breaks: bool = False) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if breaks else data)
        if breaks:
            self.close_connection = True


@pytest.fixture
def hub(tiny_r1: Path, tmp_path: Path) -> Iterator[Hub]:
    # 41 MB: huggingface_hub keeps what it has in pieces of 10.
    folder = tmp_path / "hub"
    make_checkpoint("Qwen2", {"vocab_size": 20000, "hidden_size": 256}, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "train.py", "arithmetic.jsonl"):
        shutil.copy(tiny_r1 / name, folder)
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def _export(hub: Hub, home: Path, out: Path, offline: str) -> subprocess.CompletedProcess[str]:
    port = hub.server_address[1]
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    command = [
        sys.executable,
        "-m",
        "toolkit",
        "export",
        "cpu",
        "--checkpoint",
        REPO,
        "--no-validate",
        "--quality",
        "fast",
    ]
    return subprocess.run(
        [*command, "--out", str(out)], env=environment, capture_output=True, text=True, encoding="utf-8"
    )


def test_hub_id_is_downloaded_resumed_and_then_found_offline(hub: Hub, tmp_path: Path) -> None:
    broken = _export(hub, tmp_path / "home", tmp_path / "b", offline="0")
    assert broken.returncode == 2 and "run again to resume" in broken.stderr.splitlines()[-1]
    hub.mended = True
    done = _export(hub, tmp_path / "home", tmp_path / "b", offline="0")
    assert done.returncode == 0, done.stderr
    weights = [(command, wanted) for command, path, wanted in hub.requests if path.endswith(".safetensors")]
    data = (hub.folder / "model.safetensors").read_bytes()
    resumed = [int(wanted.removeprefix("bytes=").rstrip("-")) for _, wanted in weights if wanted]
    assert any(10 << 20 <= start <= len(data) // 2 for start in resumed), weights
    fetched = {path.rsplit("/", 1)[-1] for command, path, _ in hub.requests if command == "GET"}
    assert "model.safetensors" in fetched and not any(name.endswith((".py", ".jsonl")) for name in fetched)
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text(encoding="utf-8"))
    entry = {"name": "model.safetensors", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["checkpoint"] == [entry]
    before = len(hub.requests)
    assert _export(hub, tmp_path / "home", tmp_path / "offline", offline="1").returncode == 0
    assert len(hub.requests) == before
    missing = _export(hub, tmp_path / "empty", tmp_path / "none", offline="1")
    assert missing.returncode == 2 and "could not be downloaded" in missing.stderr.splitlines()[-1]
