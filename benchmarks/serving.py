"""What the server costs: `python -m benchmarks.serving BUNDLE [--starts N] [--pairs N] [--new-tokens N]`.

Single answers in pairs, of the same prompt and as many greedy tokens: one as `toolkit bench` runs it (the same
function, on the model that the server's process has open, by that process' clock), one streamed to a client that does
nothing but note when lines come. Which is first changes from pair to pair. Both wait for the first token from before
the generator is made; the client's wait also has its connection, HTTP, the tokenizer and the pipes. What is told of a
start of the server, and of all, are medians of the pairs' ratios, with 95% intervals by bootstrap: a machine that is
slow for a minute, or a process that got bad pages, is slow on both sides of a pair.

With --requests that many short answers follow, and the memory of the server and of the bundle's process is told along
the way.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.serving_child import MARK

_PROMPT: Final = "Once there was a small house by the river where an old man lived with his dog and a lamp. " * 6
_HEADERS: Final = {"Content-Type": "application/json"}
# The runtime's threads go on looking for work for a moment when they have none.
_REST_S: Final = 0.05
_RESAMPLES: Final = 4000
_MEASURED: Final = (
    "from toolkit.serve import process; process.CHILD = 'benchmarks.serving_child'\n"
    "from toolkit.__main__ import run; run()"
)


@dataclass(frozen=True)
class Run:
    """One text: its tokens, seconds to the first, tokens a second after it, and in how many lines it came."""

    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    tokens_per_s: float
    lines: int = 0


@dataclass(frozen=True)
class Pair:
    """The same text both ways, and the seconds of a core that the server's own process took for the served one."""

    bench: Run
    served: Run
    server_s: float

    @property
    def first(self) -> float:
        """Returns how much longer the first token took."""
        return self.served.ttft_s / self.bench.ttft_s

    @property
    def decode(self) -> float:
        """Returns how much of the speed after it is left."""
        return self.served.tokens_per_s / self.bench.tokens_per_s


@contextmanager
def server(bundle: Path) -> Iterator[tuple[int, psutil.Process]]:
    """`toolkit serve BUNDLE` on a free port, whose bundle can be benched as well, and its process."""
    command = [sys.executable, "-c", _MEASURED, "serve", str(bundle), "--port", "0"]
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


def streamed(port: int, new_tokens: int) -> Run:
    """A text through the server, by the client's clock."""
    body = {"prompt": _PROMPT, "max_tokens": new_tokens, "temperature": 0, "stream": True}
    begun = time.perf_counter()
    answer = asked(port, {**body, "stream_options": {"include_usage": True}})
    first, last, lines, usage = 0.0, 0.0, 0, {"prompt_tokens": 0, "completion_tokens": 0}
    while line := answer.readline():
        now = time.perf_counter()
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if chunk["choices"] and chunk["choices"][0]["text"]:
            first, last, lines = first or now, now, lines + 1
        usage = chunk.get("usage") or usage
    tokens = usage["completion_tokens"]
    return Run(usage["prompt_tokens"], tokens, first - begun, (tokens - 1) / (last - first), lines)


def benched(port: int, new_tokens: int) -> Run:
    """The same text as `toolkit bench` runs it, in the server's process of the bundle."""
    body = json.loads(asked(port, {"prompt": MARK + _PROMPT, "max_tokens": new_tokens, "temperature": 0}).read())
    took = body["timings"]
    return Run(took["prompt_n"], took["predicted_n"], took["prompt_ms"] / 1000, took["predicted_per_second"])


def pair(port: int, process: psutil.Process, new_tokens: int, bench_first: bool) -> Pair:
    """A text both ways, one after the other."""
    made: dict[bool, Run] = {}
    server_s = 0.0
    for is_bench in (bench_first, not bench_first):
        time.sleep(_REST_S)
        before = process.cpu_times()
        made[is_bench] = benched(port, new_tokens) if is_bench else streamed(port, new_tokens)
        after = process.cpu_times()
        if not is_bench:
            server_s = after.user + after.system - before.user - before.system
    return Pair(made[True], made[False], server_s)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a median by bootstrap; the resamples are the same each time."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return medians[_RESAMPLES // 40], medians[-1 - _RESAMPLES // 40]


def told(name: str, values: Sequence[float]) -> str:
    """A median of ratios with its interval."""
    low, high = interval(values)
    return f"{name} {statistics.median(values):.4f} ({low:.4f} to {high:.4f})"


def spread(values: Sequence[float]) -> str:
    """A median and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def compare(bundle: Path, starts: int, pairs: int, new_tokens: int) -> None:
    """Prints each start's medians, and those of all pairs."""
    every: list[Pair] = []
    for start in range(starts):
        with server(bundle) as (port, process):
            warm = streamed(port, new_tokens)
            # A text that ends by itself is cut before its end: the bench goes on past it.
            new_tokens = min(new_tokens, warm.new_tokens - (warm.new_tokens < new_tokens))
            benched(port, new_tokens)
            here = [pair(port, process, new_tokens, k % 2 == 0) for k in range(pairs)]
        every += here
        firsts, decodes = [one.first for one in here], [one.decode for one in here]
        print(f"start {start + 1}: {told('first token', firsts)}, {told('decoding', decodes)}", flush=True)
    for way in ("bench", "served"):
        runs: list[Run] = [getattr(one, way) for one in every]
        ttft, speed = [1000 * run.ttft_s for run in runs], [run.tokens_per_s for run in runs]
        print(f"{way}: first token after {spread(ttft)} ms, {spread(speed)} tokens/s")
    added = [1000 * (one.served.ttft_s - one.bench.ttft_s) for one in every]
    text, lines = every[0].served, statistics.median(one.served.lines for one in every)
    print(f"{text.prompt_tokens} prompt and {text.new_tokens} new tokens in {lines:.0f} lines, {len(every)} pairs")
    print(f"the server's own process: {1000 * statistics.mean(one.server_s for one in every):.1f} ms of a core a text")
    print(f"added to the first token: {told('ms', added)}")
    firsts, decodes = [one.first for one in every], [one.decode for one in every]
    print(f"served / bench: {told('first token', firsts)}, {told('decoding', decodes)}")


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
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=0)
    given = parser.parse_args()
    print(f"load {', '.join(f'{load:.1f}' for load in psutil.getloadavg())}", flush=True)
    if given.starts and given.pairs:
        compare(given.bundle, given.starts, given.pairs, given.new_tokens)
    if given.requests:
        repeat(given.bundle, given.requests)


if __name__ == "__main__":
    main()
