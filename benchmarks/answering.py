"""What files are measured on, and questions for files that are no bundles: whole prompts, answered side by side.

B sequences, L tokens in the cache, K kv heads, Dh head_dim.
"""

from __future__ import annotations

import importlib.util
import os
import random
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
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    rooms = [len(ids) + room for ids, room in zip(asked.ids, asked.rooms, strict=True)]
    slots = _Slots(session, min(_SEQUENCES, len(rooms)), max(rooms, default=0))
    made: list[list[int]] = [[] for _ in asked.ids]
    waiting, live = list(range(len(asked.ids)))[::-1], dict[int, int]()
    while waiting or live:
        for slot in (slot for slot in range(slots.count) if waiting and slot not in live):
            live[slot] = waiting.pop()
            made[live[slot]].append(slots.begin(slot, asked.ids[live[slot]]))
        live = {
            slot: k for slot, k in live.items() if len(made[k]) < asked.rooms[k] and made[k][-1] not in asked.stop_ids
        }
        if live:
            for slot, token in slots.step({slot: made[k][-1] for slot, k in live.items()}).items():
                made[live[slot]].append(token)
    return made


class _Slots:
    """Sequences of different lengths in one cache of `longest` tokens, each from the front of its slot:
    GroupQueryAttention takes as much of a row as its mask says (`seqlens_k` of the operator), and writes keys and
    values in place where past and present are the same memory."""

    def __init__(self, session: ort.InferenceSession, count: int, longest: int) -> None:
        self.count, self._session, self._lengths = count, session, [0] * count
        past = {value.name: value for value in session.get_inputs() if names.is_past(value.name)}
        self._has_positions = any(value.name == names.POSITION_IDS for value in session.get_inputs())
        shapes = {name: (int(value.shape[1]), int(value.shape[3])) for name, value in past.items()}
        self._cache = {
            name: np.zeros((count, heads, longest, width), np.float32) for name, (heads, width) in shapes.items()
        }

    def begin(self, slot: int, prompt: list[int]) -> int:
        """Puts a sequence into a slot; returns the token after its prompt."""
        empty = {name: np.zeros((1, held.shape[1], 0, held.shape[3]), np.float32) for name, held in self._cache.items()}
        fed = {**self._fed(np.array([prompt], np.int64), np.array([len(prompt)])), **empty}
        wanted = [names.LOGITS, *(names.present_of(name) for name in self._cache)]
        logits, *made = self._session.run(wanted, fed)
        for held, present in zip(self._cache.values(), made, strict=True):
            held[slot, :, : len(prompt)] = present[0]
        self._lengths[slot] = len(prompt)
        return int(logits[0, -1].argmax())

    def step(self, tokens: dict[int, int]) -> dict[int, int]:
        """The token after each of `tokens`, by its slot. A slot without one is computed with the others, and what that
        writes is written over by the next prompt."""
        ids = np.array([[tokens.get(slot, 0)] for slot in range(self.count)], np.int64)
        self._lengths = [length + 1 if slot in tokens else 1 for slot, length in enumerate(self._lengths)]
        bound = self._session.io_binding()
        bound.bind_output(names.LOGITS, "cpu")
        fed = self._fed(ids, np.array(self._lengths))
        for name, values in fed.items():
            bound.bind_cpu_input(name, values)
        for name, held in self._cache.items():
            place = ("cpu", 0, np.float32, held.shape, held.ctypes.data)
            bound.bind_input(name, *place)
            bound.bind_output(names.present_of(name), *place)
        self._session.run_with_iobinding(bound)
        best = bound.get_outputs()[0].numpy()[:, -1].argmax(axis=-1)
        return {slot: int(best[slot]) for slot in tokens}

    def _fed(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        fed: dict[str, NDArray[Any]] = {
            names.INPUT_IDS: ids,
            names.ATTENTION_MASK: (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64),
        }
        if self._has_positions:
            fed[names.POSITION_IDS] = lengths[:, None] - ids.shape[1] + np.arange(ids.shape[1])
        return fed
