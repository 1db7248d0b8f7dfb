"""A bundle in a process of its own, which writes the texts that the server asks for, one at a time.

onnxruntime-genai keeps the interpreter's lock while it reads a prompt, vendors' native code may crash, and memory goes
back to the system only with its process.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from toolkit.errors import ToolkitError
from toolkit.evaluate.chat_prompt import without_thoughts
from toolkit.evaluate.text_model import TextModel, Written
from toolkit.evaluate.thought import Piece, ScoredToken
from toolkit.serve.job import FAILED, READY, REFUSED, WRITTEN, Event, Job, Told, line
from toolkit.serve.refusal import without_paths
from toolkit.serve.trimmed import Trimmed
from toolkit.typed_json import from_json

# Ten lines a second read as fluently as more would: a model that writes faster writes faster than anybody reads. Each
# takes the server and its client about a millisecond of a core that the model could have.
_TOGETHER_S: Final = 0.1
# The runtime's threads hold every core and go on with the next token at once, so that the server and then its client
# would each wait for the end of a turn, some milliseconds: a text's first line leaves them a core.
_FIRST_REST_S: Final = 0.002
TOOL_CALL: Final = "<tool_call>"


@dataclass(frozen=True)
class Out:
    """Where events go: the stdout this process began with."""

    stream: BinaryIO

    def say(self, event: Event) -> None:
        """Writes an event out at once, a line of its own."""
        self.stream.write(line(event))
        self.stream.flush()


class _Together:
    """Text on its way out: what comes soon after the last line waits for the next token, so that a fast model does not
    spend its time on lines, nor the server and the client theirs on reading them."""

    def __init__(self, out: Out) -> None:
        self._out, self._said_at, self._is_first = out, 0.0, True
        self._kind, self._texts, self._tokens = "", list[str](), list[ScoredToken]()

    def add(self, kind: str, text: str, tokens: tuple[ScoredToken, ...]) -> None:
        """Takes a piece, and says it with those before it if the last line is some time ago."""
        if kind != self._kind:
            self.say()
        self._kind = kind
        self._texts.append(text)
        self._tokens += tokens
        if time.monotonic() - self._said_at >= _TOGETHER_S:
            self.say()

    def say(self) -> None:
        """Says what is held, if anything is."""
        if self._texts:
            self._out.say(Event(self._kind, "".join(self._texts), tuple(self._tokens)))
            self._texts, self._tokens = [], []
            if self._is_first:
                time.sleep(_FIRST_REST_S)
                self._is_first = False
            self._said_at = time.monotonic()


class Orders:
    """Jobs from stdin, read by a thread so that a job can be stopped while it runs."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._jobs: queue.Queue[Job] = queue.Queue()
        self._stopped = -1
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> Job:
        """Returns the next job, and waits until there is one."""
        return self._jobs.get()

    def is_stopped(self, job: Job) -> bool:
        """Whether the server has given up on a job."""
        return job.number <= self._stopped

    def _read(self) -> None:
        for text in self._stream:
            order = from_json(Told, json.loads(text), "an order")
            if order.job is not None:
                self._jobs.put(order.job)
            if order.stop is not None:
                self._stopped = order.stop
        # The server is gone.
        os._exit(0)


def serve_bundle(bundle: Path, on_cpu: bool, orders: Orders, out: Out) -> None:
    """Opens a bundle and writes text after text until the server goes."""
    try:
        model = TextModel(bundle, on_cpu)
    except ToolkitError as problem:
        out.say(Event(FAILED, str(problem)))
        return
    out.say(Event(READY, str(model.settings.context_length)))
    while True:
        job = orders.next()
        try:
            out.say(write_text(model, job, orders, out))
        except ToolkitError as problem:
            out.say(Event(REFUSED, without_paths(str(problem))))
        except Exception as problem:
            print(f"error: a job failed: {type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
            out.say(Event(FAILED, type(problem).__name__))


def write_text(model: TextModel, job: Job, orders: Orders, out: Out) -> Event:
    """Writes one text, its pieces said as they come, and returns the event that ends it."""
    prompt = job.prompt if job.prompt is not None else _prompt(model, job)
    if prompt is None:
        return Event(REFUSED, "the model's chat template has no place for tools: leave `tools` out")
    together = _Together(out)
    trimmed = {kind: Trimmed(job.options.splits_thought) for kind in ("thought", "answer")}
    pieces = model.pieces(prompt, job.options)
    while True:
        try:
            piece: Piece = next(pieces)
        except StopIteration as end:
            written: Written = end.value
            together.say()
            return Event(WRITTEN, written=written)
        if orders.is_stopped(job):
            pieces.close()
            return Event(FAILED, "stopped")
        if piece.kind in trimmed and ((text := trimmed[piece.kind].add(piece)) or piece.tokens):
            together.add(piece.kind, text, piece.tokens)


def _prompt(model: TextModel, job: Job) -> str | None:
    """The job's messages as a prompt; None where tools are given and the template leaves them out."""
    messages, tools = without_thoughts(json.loads(job.messages)), json.loads(job.tools)
    prompt = model.template.render(messages, tools=tools)
    return None if tools and TOOL_CALL not in prompt else prompt


def main() -> None:
    """In the child: whatever native code prints goes to stderr, and stdout carries events alone."""
    # An interrupt in the terminal is the server's to heed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = Out(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    serve_bundle(Path(sys.argv[1]), "--on-cpu" in sys.argv[2:], Orders(sys.stdin.buffer), out)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
