"""A task put to a bundle and to its checkpoint, greedily: what each gets right, how long its answers are."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from toolkit import names
from toolkit.bundle.settings import read_settings
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.weights import Tensors
from toolkit.device.arrays import Device
from toolkit.device.fitting import ON_NUMPY, Fitting, Pool
from toolkit.errors import BundleError, RecipeError
from toolkit.evaluate.chat_prompt import ChatTemplate
from toolkit.evaluate.session import continuations, open_model
from toolkit.evaluate.simulated_answers import drafted_answers, simulator_judge
from toolkit.evaluate.tasks import Task
from toolkit.evaluate.thought import after_thought
from toolkit.reference.greedy import greedy_continuations
from toolkit.report.sections import Answered

# What the reference may take for the cache of the questions it answers side by side.
_CACHE_BYTES: Final = 4 << 30
# What a pool's process is given at once: it opens the bundle for them.
_ASKED_TOGETHER: Final = 8


@dataclass(frozen=True)
class Asked:
    """A task as one bundle and its checkpoint are asked it.

    `texts` and `ids` are the whole prompts; an answer may have `new_tokens`, and `rooms` of them by what the context
    leaves; one of `stop_ids` ends it.
    """

    task: Task
    texts: tuple[str, ...]
    ids: tuple[list[int], ...]
    rooms: tuple[int, ...]
    new_tokens: int
    stop_ids: frozenset[int]
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Answers:
    """By question: whether it is right, its tokens (thought included, stop id not), whether the limit cut it."""

    right: NDArray[np.bool_]
    tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]

    def figures(self) -> Answered:
        """Accuracy, its standard error where there are two questions, mean tokens, and the share that was cut."""
        n, accuracy = self.right.size, float(self.right.mean())
        # As lm-evaluation-harness has it: the sample's deviation over the root of n.
        error = math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else None
        return Answered(accuracy, float(self.tokens.mean()), float(self.truncated.mean()), error)

    def first(self, count: int) -> Answers:
        """Returns the answers to the first `count` questions alone."""
        return Answers(self.right[:count], self.tokens[:count], self.truncated[:count])


def ask(bundle: Path, task: Task, new_tokens: int, on_cpu: bool = False) -> Asked:
    """A task's prompts for a bundle, its chat template around plain questions.

    Raises BundleError for a bundle without a tokenizer or a template that is needed, RecipeError for a prompt that
    leaves no room in the context.
    """
    settings = read_settings(bundle)
    if not (bundle / names.TOKENIZER_FILE).is_file():
        raise BundleError(f"{bundle} has no {names.TOKENIZER_FILE} to ask questions with: leave them out (--no-tasks)")
    tokenizer = Tokenizer.from_file(str(bundle / names.TOKENIZER_FILE))
    texts = _texts(bundle, task, on_cpu)
    ids = tuple(tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
    rooms = tuple(settings.room_after(len(prompt), new_tokens) for prompt in ids)
    for question, prompt, room in zip(task.questions, ids, rooms, strict=True):
        if room < 1:
            raise RecipeError(
                f"task {task.name}, line {question.line}: the prompt has {len(prompt)} tokens, and the bundle's "
                f"context of {settings.context_length} leaves none for an answer: export with a larger "
                "--set context_length, or leave the question out"
            )
    return Asked(task, texts, ids, rooms, new_tokens, frozenset(settings.eos_token_ids), tokenizer)


def bundle_answers(bundle: Path, asked: Asked, on_cpu: bool = False, pool: Pool | None = None) -> Answers:
    """Returns what a bundle answers through onnxruntime-genai, here or where a pool's processes run it."""
    if pool is None:
        return judged(asked, continuations(bundle, list(asked.ids), asked.new_tokens, on_cpu))
    prompts, asking = list(asked.ids), Asking(bundle.absolute(), asked.new_tokens, on_cpu)
    groups = [prompts[start : start + _ASKED_TOGETHER] for start in range(0, len(prompts), _ASKED_TOGETHER)]
    return judged(asked, [ids for made in pool.map(_asked, asking, groups) for ids in made])


@dataclass(frozen=True)
class Asking:
    """What a process needs to ask a bundle some questions."""

    bundle: Path
    new_tokens: int
    on_cpu: bool


def _asked(asking: Asking, prompts: list[list[int]]) -> list[list[int]]:
    """What a bundle makes of some prompts. Raises FileNotFoundError where it does not lie."""
    if not asking.bundle.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(asking.bundle))
    return continuations(asking.bundle, prompts, asking.new_tokens, asking.on_cpu)


def simulated_answers(bundle: Path, asked: Asked) -> Answers:
    """What a bundle answers with its transformer in the simulator. Raises BundleError if that does not run."""
    room = min(asked.rooms)

    def draft(prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        return continuations(bundle, list(prompts), new_tokens, on_cpu=True)

    return judged(asked, drafted_answers(asked.ids, room, asked.stop_ids, draft, simulator_judge(bundle)))


def first_of(asked: Asked, count: int) -> Asked:
    """Returns the task with its first questions alone."""
    task = replace(asked.task, questions=asked.task.questions[:count])
    return replace(asked, task=task, texts=asked.texts[:count], ids=asked.ids[:count], rooms=asked.rooms[:count])


def reference_answers(config: ModelConfig, source: Tensors, asked: Asked, fitting: Fitting = ON_NUMPY) -> Answers:
    """Returns what the reference answers with the tensors of `source`; it asks in groups whose KV cache fits
    `_CACHE_BYTES`, on the CPU where the weights do not fit the device."""
    room = max(asked.rooms)
    token_bytes = 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    group = max(1, _CACHE_BYTES // (token_bytes * (max(map(len, asked.ids)) + room)))
    if fitting.pool:
        # So many whatever the number of processes: the last bits of a product depend on how many go together.
        group = min(group, _ASKED_TOGETHER)
    groups = [list(asked.ids[start : start + group]) for start in range(0, len(asked.ids), group)]
    continuing = Continuing(config, source, room, frozenset(asked.stop_ids))
    if fitting.pool:
        found = fitting.pool.map(_continued, continuing, groups)
    else:
        found = [
            fitting.run("answers of the checkpoint", partial(_continued_on, continuing, prompts)) for prompts in groups
        ]
    made = [ids for some in found for ids in some]
    return judged(asked, [ids[:room] for ids, room in zip(made, asked.rooms, strict=True)])


@dataclass(frozen=True)
class Continuing:
    """What a process needs to continue prompts as the checkpoint does: `room` tokens at most, ended by a stop id."""

    config: ModelConfig
    source: Tensors
    room: int
    stop_ids: frozenset[int]


def _continued(asked: Continuing, prompts: list[list[int]]) -> list[list[int]]:
    return greedy_continuations(asked.config, asked.source, prompts, asked.room, set(asked.stop_ids))


def _continued_on(asked: Continuing, prompts: list[list[int]], on: Device, _: int) -> list[list[int]]:
    return greedy_continuations(asked.config, asked.source, prompts, asked.room, set(asked.stop_ids), on)


@dataclass(frozen=True)
class Pairs:
    """The same questions answered twice: how many became wrong, and right, and the standard error of the drop in
    accuracy between such pairs, where there are two questions."""

    right_to_wrong: int
    wrong_to_right: int
    accuracy_drop_se: float | None


def compared(ours: Answers, theirs: Answers) -> Pairs:
    """A bundle's answers beside those of its checkpoint."""
    return pairs_of(ours.right, theirs.right)


def pairs_of(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> Pairs:
    """Returns which questions were answered rightly beside those that were before."""
    lost, won = int((theirs & ~ours).sum()), int((ours & ~theirs).sum())
    n = ours.size
    if n < 2:
        return Pairs(lost, won, None)
    # The variance of -1, 0 and 1 over the pairs (McNemar's setting): what both get right, or wrong, adds nothing.
    spread = (lost + won - (lost - won) ** 2 / n) / (n - 1)
    return Pairs(lost, won, math.sqrt(spread / n))


def _texts(bundle: Path, task: Task, on_cpu: bool) -> tuple[str, ...]:
    if not any(question.plain for question in task.questions):
        return tuple(question.text for question in task.questions)
    template = ChatTemplate(bundle, open_model(bundle, on_cpu))
    return tuple(
        template.render([{"role": "user", "content": question.text}]) if question.plain else question.text
        for question in task.questions
    )


def judged(asked: Asked, made: Sequence[list[int]]) -> Answers:
    """Returns what tokens that were made of each prompt, a stop id included, are worth as answers."""
    ended = np.array([bool(ids) and ids[-1] in asked.stop_ids for ids in made])
    texts = [asked.tokenizer.decode(ids, skip_special_tokens=True) for ids in made]
    answers = [after_thought(prompt, text) for prompt, text in zip(asked.texts, texts, strict=True)]
    right = [question.is_right(text) for question, text in zip(asked.task.questions, answers, strict=True)]
    return Answers(np.array(right), np.array([len(ids) for ids in made]) - ended, ~ended)
