"""What speculation is worth here: `python -m benchmarks.speculation BUNDLE`.

The bundle is one that a recipe with `speculation: draft`, `mtp` or `ngram` made. Each question is continued greedily in
turn by the same graph without guesses, with n-grams of the text so far, and with the bundle's draft or MTP head, so
that what else the machine does meets all alike. The table has, by what guesses and how many guesses a round: the share
of guesses that were right, tokens for each run of the graph, tokens/s beside decoding without guesses, and how many
continuations are the same. Two that differ in four bits may be a near tie, which a run over several tokens rounds
otherwise than one over one token; the table does not tell.

    toolkit export cpu --checkpoint coder-1.5b --draft coder-0.5b --quality fast --no-validate --out build/pair
    python -m benchmarks.speculation build/pair --task gsm8k.jsonl --minutes 8

`--llama MODEL DRAFT`, two GGUF files, has llama.cpp continue the same questions in turn with ours: by itself, and with
its own speculation (`llama-speculative-simple`) at each number of guesses. It is built the first time, in six minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import onnxruntime_genai as og

from benchmarks.peers.llama_cpp import llama_cpp
from benchmarks.peers.llama_speculation import LlamaWay
from toolkit.bundle.speculative import draft_graph, head_settings, read_speculation, speculation_of
from toolkit.errors import ToolkitError
from toolkit.evaluate.guesses import Guesses, MtpText, guesses_of, speculating_config
from toolkit.evaluate.text_model import TextModel
from toolkit.speculation import NGRAM, NONE, SPECULATIONS

ROOT: Final = Path(__file__).resolve().parent.parent
_HEADS: Final = ("guesses", "a round", "right", "tokens a run", "tokens/s", "beside none", "same", "tokens")


@dataclass
class Way:
    """One way to decode, and what it has come to so far: `at_once` guesses a round, none for plain decoding; `head` is
    the MTP head's model where that guesses."""

    word: str
    at_once: int
    model: Any
    head: Any = None
    seconds: float = 0.0
    same: int = 0
    guesses: Guesses = field(default_factory=Guesses)

    def continued(self, prompt: Any, new_tokens: int) -> list[int]:
        """The greedy continuation of a prompt, timed from the first token after it has been read."""
        params = og.GeneratorParams(self.model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + new_tokens)
        if self.at_once:
            params.set_speculative_options(max_draft_tokens=self.at_once)
        head = self.head
        generator = og.Generator(self.model, params) if head is None else MtpText(og, self.model, head, params)
        generator.append_tokens(prompt)
        begun, made = time.perf_counter(), list[int]()
        while not generator.is_done():
            generator.generate_next_token()
            # Not the generator's sequence: an MTP head's has the guesses behind the last token too.
            made.append(int(generator.get_next_tokens()[0]))
        self.seconds += time.perf_counter() - begun
        self.guesses += guesses_of(generator, len(made)) if self.at_once else Guesses(0, 0, len(made), len(made))
        return made

    def row(self, plain: Way, asked: int) -> str:
        """Its line of the table."""
        told, tokens = self.guesses.described(self.word), self.guesses.tokens
        rate, beside = tokens / self.seconds, plain.guesses.tokens / plain.seconds
        right = f"{told.acceptance_rate:.0%}" if self.at_once else ""
        cells = (self.word, self.at_once or "", right, f"{told.tokens_per_run:.2f}", f"{rate:.1f}")
        return _line((*cells, f"{rate / beside:.2f}", f"{self.same} of {asked}", tokens))


def ways_of(bundle: Path, widths: Sequence[int]) -> list[Way]:
    """Plain decoding first, then n-grams and, where the bundle has one, its draft or MTP head, at each width."""
    found = [Way(NONE, 0, og.Model(str(bundle)))]
    told: list[tuple[str, Any]] = [(NGRAM, {"speculative": dict(SPECULATIONS[NGRAM])})]
    settings = read_speculation(bundle)
    if draft_graph(settings):
        told.append((str(speculation_of(settings)), settings))
    for word, overlay in told:
        model = og.Model(speculating_config(og, str(bundle), overlay))
        laid = head_settings(overlay)
        head = None if laid is None else og.Model(speculating_config(og, str(bundle), laid))
        found += [Way(word, width, model, head) for width in widths]
    return found


def questions_of(path: Path, bundle: Path, count: int) -> list[tuple[str, Any]]:
    """The first questions of a task in the bundle's own chat template, each as text and as ids."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    template = TextModel(bundle).template
    texts = [template.render([{"role": "user", "content": line.get("prompt") or line["question"]}]) for line in lines]
    return [(text, template.tokenizer.encode(text)) for text in texts]


def llama_ways(model: Path, draft: Path, widths: Sequence[int]) -> list[LlamaWay]:
    """llama.cpp's plain decoding of a file first, then the draft at each width."""
    tools = llama_cpp(ROOT / "build" / "peers")
    return [LlamaWay(tools, model), *(LlamaWay(tools, model, draft, width) for width in widths)]


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Prints the table once the questions are through, or the time is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--task", type=Path, default=ROOT / "models" / "tiny-r1" / "arithmetic.jsonl")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--guesses", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--llama", nargs=2, type=Path, metavar=("MODEL", "DRAFT"))
    asked = parser.parse_args()
    questions, ways = questions_of(asked.task, asked.bundle, asked.prompts), ways_of(asked.bundle, asked.guesses)
    llamas = llama_ways(asked.llama[0], asked.llama[1], asked.guesses) if asked.llama else []
    for way in ways:
        # The first run of a session is slower than all others.
        way.continued(questions[0][1], 8)
        way.seconds, way.guesses = 0.0, Guesses()
    end, done = time.monotonic() + 60 * asked.minutes, 0
    for text, prompt in questions:
        made = [way.continued(prompt, asked.new_tokens) for way in ways]
        done += 1
        for way, continued in zip(ways, made, strict=True):
            way.same += continued == made[0]
        for llama in llamas:
            llama.continue_text(text, asked.new_tokens)
        if time.monotonic() > end:
            break
    print(_line(_HEADS) + "\n|" + "---|" * len(_HEADS))
    print("\n".join([*(way.row(ways[0], done) for way in ways), *(_line(x.cells(llamas[0])) for x in llamas)]))


if __name__ == "__main__":
    try:
        main()
    except ToolkitError as problem:
        sys.exit(f"error: {problem}")
