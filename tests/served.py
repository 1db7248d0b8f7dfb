"""`toolkit serve` as a user starts it, in a process of its own, and its end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
# A template with a place for tools, as Hermes and Qwen have it, which opens no thought.
TOOL_TEMPLATE = (
    "{% if tools %}<｜User｜>{% for tool in tools %}{{ tool.function.name }}{% endfor %} <tool_call>{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{% else %}<｜Assistant｜>{% endif %}"
    "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)


@dataclass
class Served:
    """A server that listens: where, its process, and what it has said on stderr."""

    url: str
    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def child(self) -> psutil.Process:
        """The process of its one open bundle."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, headers=headers)


@contextmanager
def served(*words: str | Path, cwd: Path | None = None, environment: Mapping[str, str] = {}) -> Iterator[Served]:
    """`toolkit serve WORDS… --port 0` in a folder, from when it listens until it has ended."""
    command = [sys.executable, "-m", "toolkit", "serve", *map(str, words), "--port", "0"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, **environment, "PYTHONPATH": path},
        cwd=cwd,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r"http://\S+?:(\d+)/", line)
    if found is None:
        raise AssertionError(line + process.stderr.read())
    server = Served(f"http://127.0.0.1:{found[1]}", process, [line])
    reader = threading.Thread(target=lambda: server.said.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(20)
        reader.join(5)


def one_thread(bundle: Path) -> Path:
    """The bundle told to compute with one thread: a small model is served no faster by two."""
    path = bundle / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
    path.write_text(json.dumps(config), encoding="utf-8")
    return bundle


def with_tools(bundle: Path) -> Path:
    """The bundle with a template that has a place for tools."""
    path = bundle / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["chat_template"] = TOOL_TEMPLATE
    path.write_text(json.dumps(config), encoding="utf-8")
    return bundle
