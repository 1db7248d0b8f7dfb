"""What files are measured on, and questions for files that are no bundles: whole prompts, answered side by side.

B sequences, L tokens in the cache, K kv heads, Dh head_dim.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks.peers.tool import PeerError
from toolkit import names
from toolkit.bundle.chat_text import ChatText
from toolkit.bundle.stop_tokens import stop_tokens
from toolkit.checkpoint.opened import Checkpoint
from toolkit.evaluate.answers import Asked
from toolkit.evaluate.tasks import Question, Task

_NEW_TOKENS: Final = 300
# So many questions are answered side by side: each pass reads the weights once for all of them.
_SEQUENCES: Final = 16


@dataclass(frozen=True)
class Material:
    """What files are measured on: token sequences, other ones to calibrate peers on, and questions."""

    sequences: list[list[int]]
    calibration_sequences: list[list[int]]
    task: Task | None = None


def machine_load() -> float | None:
    """How many processes wanted a core over the last minute, None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def fresh_questions(generator: Path, count: int, seed: int) -> Task:
    """`count` questions from models/tiny-r1/generate.py. Raises PeerError if it is not there."""
    spec = importlib.util.spec_from_file_location("tiny_r1_generate", generator)
    if spec is None or spec.loader is None or not generator.is_file():
        raise PeerError(f"{generator} is missing: fresh questions come from the source tree's generator")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source = random.Random(seed)
    examples = [module.example(source) for _ in range(count)]
    asked = enumerate((str(module.prompt(example)), str(example["answer"])) for example in examples)
    questions = tuple(Question(k + 1, prompt, False, answer, "exact") for k, (prompt, answer) in asked)
    return Task(f"{count} fresh questions, seed {seed}", questions)


def asked_of(checkpoint: Checkpoint, task: Task) -> Asked:
    """The task as a checkpoint's own tokenizer, chat template (around plain questions) and end tokens have it."""
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / names.TOKENIZER_FILE))
    chat = ChatText(checkpoint) if any(question.plain for question in task.questions) else None
    texts = tuple(
        chat.written([{"role": "user", "content": question.text}]) if chat and question.plain else question.text
        for question in task.questions
    )
    ids = tuple(tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
    rooms = (_NEW_TOKENS,) * len(ids)
    config = checkpoint.config
    stops = stop_tokens(checkpoint.side, config.eos_token_ids, config.vocab_size)
    return Asked(task, texts, ids, rooms, _NEW_TOKENS, frozenset(token.id for token in stops), tokenizer)


def graph_answers(folder: Path, asked: Asked) -> list[list[int]]:
    """What a folder's model.onnx on the CPU makes of each prompt, greedily, ended by (and including) a stop id or by
    the room there is; `_SEQUENCES` of them side by side, which onnxruntime-genai does not do for prompts of many
    lengths."""
    sequences = _SideBySide(ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"]))
    made: list[list[int]] = [[] for _ in asked.ids]
    waiting, live = list(range(len(asked.ids)))[::-1], list[int]()
    while waiting or live:
        while waiting and len(live) < _SEQUENCES:
            live.append(waiting.pop())
            made[live[-1]].append(sequences.begin(asked.ids[live[-1]]))
        going = [len(made[k]) < asked.rooms[k] and made[k][-1] not in asked.stop_ids for k in live]
        live = [k for k, goes in zip(live, going, strict=True) if goes]
        sequences.keep(going)
        if live:
            for k, token in zip(live, sequences.step([made[k][-1] for k in live]), strict=True):
                made[k].append(token)
    return made


class _SideBySide:
    """Sequences of different lengths in one cache, each from its front: GroupQueryAttention takes as much of a row as
    its mask says (`seqlens_k` of the operator)."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session, self._lengths = session, list[int]()
        self._past = {value.name: value for value in session.get_inputs() if names.is_past(value.name)}
        self._has_positions = any(value.name == names.POSITION_IDS for value in session.get_inputs())
        self._cache: dict[str, NDArray[np.float32]] = {}
        for name, value in self._past.items():
            self._cache[name] = np.zeros((0, int(value.shape[1]), 0, int(value.shape[3])), np.float32)

    def begin(self, prompt: list[int]) -> int:
        """Adds a sequence; returns the token after its prompt."""
        empty = {name: np.zeros((1, held.shape[1], 0, held.shape[3]), np.float32) for name, held in self._cache.items()}
        tokens, made = self._run(np.array([prompt], np.int64), np.array([len(prompt)]), empty)
        longest = max([len(prompt), *self._lengths])
        for name, held in self._cache.items():
            self._cache[name] = np.concatenate([_padded(held, longest), _padded(made[name], longest)])
        self._lengths.append(len(prompt))
        return tokens[0]

    def keep(self, going: Sequence[bool]) -> None:
        """Ends the sequences that do not go on."""
        self._lengths = [length for length, goes in zip(self._lengths, going, strict=True) if goes]
        longest = max(self._lengths, default=0)
        if not all(going):
            self._cache = {name: held[np.array(going)][:, :, :longest] for name, held in self._cache.items()}

    def step(self, tokens: list[int]) -> list[int]:
        """The token after each of `tokens`, one a sequence."""
        self._lengths = [length + 1 for length in self._lengths]
        following, self._cache = self._run(np.array(tokens, np.int64)[:, None], np.array(self._lengths), self._cache)
        return following

    def _run(
        self, ids: NDArray[np.int64], lengths: NDArray[np.int64], cache: dict[str, NDArray[np.float32]]
    ) -> tuple[list[int], dict[str, NDArray[np.float32]]]:
        positions = lengths[:, None] - ids.shape[1] + np.arange(ids.shape[1])
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        feeds: dict[str, Any] = {names.INPUT_IDS: ids, names.ATTENTION_MASK: mask, **cache}
        if self._has_positions:
            feeds[names.POSITION_IDS] = positions
        outputs = [value.name for value in self._session.get_outputs()]
        made = dict(zip(outputs, self._session.run(None, feeds), strict=True))
        following = made[names.LOGITS][:, -1].argmax(axis=-1)
        return following.tolist(), {name: made[names.present_of(name)] for name in self._past}


def _padded(held: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """[B, K, length, Dh] with zeros behind what is held."""
    return np.pad(held[:, :, :length], ((0, 0), (0, 0), (0, max(0, length - held.shape[2])), (0, 0)))
