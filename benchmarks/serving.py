"""What the server costs: `python -m benchmarks.serving BUNDLE [--rounds N] [--new-tokens N] [--requests N]`.

In turns, N rounds: `toolkit bench` in a process of its own, and the same number of tokens streamed through a server to
a client that does nothing but note when they come. Medians, and their ratios. With --requests that many short answers
follow, and the memory of the server and of the bundle's process is told along the way.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

_WORDS: Final = "Once there was a small house by the river where an old man lived with his dog and a lamp. "
_HEADERS: Final = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Run:
    """One text: its prompt's tokens, seconds to the first token, tokens a second after it."""

    prompt_tokens: int
    ttft_s: float
    tokens_per_s: float


@contextmanager
def server(bundle: Path) -> Iterator[tuple[int, psutil.Process]]:
    """`toolkit serve BUNDLE` on a free port, and its process."""
    command = [sys.executable, "-m", "toolkit", "serve", str(bundle), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r":(\d+)/", line)
        if found is None:
            raise SystemExit(line + process.stderr.read())
        try:
            yield int(found[1]), psutil.Process(process.pid)
        finally:
            process.terminate()


def asked(port: int, body: dict[str, Any]) -> http.client.HTTPResponse:
    """The answer to a completion, as it begins."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/completions", json.dumps(body), _HEADERS)
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(answer.read().decode())
    return answer


def streamed(port: int, prompt: str, new_tokens: int) -> Run:
    """A text through the server, by the client's clock."""
    begun = time.perf_counter()
    body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True}
    answer = asked(port, {**body, "stream_options": {"include_usage": True}})
    first, last, usage = 0.0, 0.0, {"prompt_tokens": 0, "completion_tokens": 0}
    while line := answer.readline():
        now = time.perf_counter()
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if chunk["choices"] and chunk["choices"][0]["text"]:
            first, last = first or now, now
        usage = chunk.get("usage") or usage
    return Run(usage["prompt_tokens"], first - begun, (usage["completion_tokens"] - 1) / (last - first))


def benched(bundle: Path, prompt_tokens: int, new_tokens: int) -> Run:
    """The median run of `toolkit bench` on prompts of that length."""
    command = [sys.executable, "-m", "toolkit", "bench", str(bundle), "--repeat", "5", "--json"]
    command += ["--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]
    speed = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return Run(prompt_tokens, speed["ttft_s"], speed["decode_tokens_per_s"])


def compare(bundle: Path, rounds: int, new_tokens: int) -> None:
    """Prints medians of both ways, taken in turns."""
    prompt, ways = _WORDS * 6, dict[str, list[Run]](bench=[], served=[])
    for _ in range(rounds):
        with server(bundle) as (port, _):
            streamed(port, prompt, new_tokens)
            ways["served"] += [streamed(port, prompt, new_tokens) for _ in range(5)]
        ways["bench"].append(benched(bundle, ways["served"][0].prompt_tokens, new_tokens))
    medians = {
        name: (statistics.median(run.ttft_s for run in runs), statistics.median(run.tokens_per_s for run in runs))
        for name, runs in ways.items()
    }
    for name, (ttft_s, speed) in medians.items():
        spread = sorted(run.tokens_per_s for run in ways[name])
        told = f"{speed:.1f} tokens/s ({spread[0]:.1f} to {spread[-1]:.1f})"
        print(f"{name}: first token after {1000 * ttft_s:.1f} ms, {told}", flush=True)
    first, decode = (medians["served"][k] / medians["bench"][k] for k in (0, 1))
    print(f"{ways['served'][0].prompt_tokens} prompt tokens; served / bench: first {first:.3f}, decode {decode:.3f}")


def repeat(bundle: Path, requests: int) -> None:
    """Prints the memory of the server's processes while it answers request after request."""
    body = {"messages": [{"role": "user", "content": "Add 4 and 5."}], "max_tokens": 40, "stream": True}
    with server(bundle) as (port, process):
        for k in range(1, requests + 1):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("POST", "/v1/chat/completions", json.dumps(body), _HEADERS)
            answer = connection.getresponse().read()
            connection.close()
            if b'"finish_reason": "' not in answer:
                raise SystemExit(answer.decode())
            if k == 50 or k % (requests // 10) == 0:
                sizes = [one.memory_info().rss / 2**20 for one in (process, *process.children())]
                print(f"{k} requests: " + ", ".join(f"{size:.1f} MiB" for size in sizes), flush=True)


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=0)
    given = parser.parse_args()
    print(f"load {', '.join(f'{load:.1f}' for load in psutil.getloadavg())}")
    if given.rounds:
        compare(given.bundle, given.rounds, given.new_tokens)
    if given.requests:
        repeat(given.bundle, given.requests)


if __name__ == "__main__":
    main()
