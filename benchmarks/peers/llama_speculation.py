"""llama.cpp continuing texts by itself and with a small model that drafts, by its own programs.

A text is given as it is, with its chat template's words, and continued greedily.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.tool import PeerError

_TIMEOUT_S: Final = 600
# What llama-completion says of the tokens after a prompt, and llama-speculative-simple of all.
_EVALUATED: Final = re.compile(r"(?<!prompt )eval time =\s*([\d.]+) ms /\s*(\d+) (?:runs|tokens)")
_DECODED: Final = re.compile(r"decoded\s+(\d+) tokens in\s+([\d.]+) seconds")
_DRAFTED: Final = re.compile(r"n_drafted = (\d+)\s+.*?n_accept\s+= (\d+)", re.DOTALL)


@dataclass
class LlamaWay:
    """One way to decode a file, and what it has come to so far: plain without a `draft`, else with the draft's
    `at_once` guesses a round."""

    tools: LlamaCpp
    model: Path
    draft: Path | None = None
    at_once: int = 0
    tokens: int = 0
    seconds: float = 0.0
    guessed: int = 0
    right: int = 0

    def continue_text(self, text: str, new_tokens: int) -> None:
        """Adds one text. Raises PeerError if the program fails or says nothing that is known."""
        threads = str(os.cpu_count() or 1)
        asked = ["-m", str(self.model), "-p", text, "-n", str(new_tokens), "--temp", "0", "-t", threads]
        if self.draft is None:
            told = _told([str(self.tools.completion), *asked, "-no-cnv", "--no-display-prompt"])
            seconds, tokens = _found(_EVALUATED, told)
            self.seconds, self.tokens = self.seconds + float(seconds) / 1000, self.tokens + int(tokens)
            return
        draft = ["-md", str(self.draft), "--spec-type", "draft-simple", "--spec-draft-n-max", str(self.at_once)]
        told = _told([str(self.tools.speculative), *asked, *draft, "-td", threads])
        tokens, seconds = _found(_DECODED, told)
        guessed, right = map(int, _found(_DRAFTED, told))
        self.seconds, self.tokens = self.seconds + float(seconds), self.tokens + int(tokens)
        self.guessed, self.right = self.guessed + guessed, self.right + right

    def cells(self, plain: LlamaWay) -> tuple[object, ...]:
        """Its line of the table of `benchmarks.speculation`: every round gives one token more than were right."""
        word = f"llama.cpp, {self.model.name}" if self.draft is None else f"llama.cpp, draft {self.draft.name}"
        rate, beside = self.tokens / self.seconds, plain.tokens / plain.seconds
        right = f"{self.right / max(self.guessed, 1):.0%}" if self.draft else ""
        runs = max(self.tokens - self.right, 1)
        told = (f"{self.tokens / runs:.2f}", f"{rate:.1f}", f"{rate / beside:.2f}")
        return (word, self.at_once or "", right, *told, "", self.tokens)


def _told(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise PeerError(f"{Path(command[0]).name} does not run: {problem}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise PeerError(f"{Path(command[0]).name} failed with {done.returncode}: {last[:200]}")
    return done.stdout + done.stderr


def _found(pattern: re.Pattern[str], told: str) -> tuple[str, str]:
    """The two groups of what a program said last. Raises PeerError where it said no such thing."""
    found: list[tuple[str, str]] = pattern.findall(told)
    if not found:
        raise PeerError(f"llama.cpp's program said nothing like {pattern.pattern!r}")
    return found[-1]
