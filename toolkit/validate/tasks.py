"""Questions with known answers: how many a bundle, and how many its checkpoint, gets right, greedily."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from toolkit import names
from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.weights import Tensors
from toolkit.errors import RecipeError
from toolkit.reference.greedy import greedy_continuations
from toolkit.validate.session import continuations

_NEW_TOKENS: Final = 300
_END_OF_THOUGHT: Final = "</think>"


@dataclass(frozen=True)
class Task:
    """`prompts` are whole, chat format included; an answer is what follows the end of thought, stripped."""

    name: str
    prompts: tuple[str, ...]
    answers: tuple[str, ...]


def read_task(path: Path, examples: int | None = None) -> Task:
    """The first `examples` lines of a JSONL file of `prompt` and `answer`. Raises RecipeError if it is not one."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:examples]]
        return Task(path.stem, tuple(line["prompt"] for line in lines), tuple(line["answer"] for line in lines))
    except FileNotFoundError:
        raise RecipeError(f"the recipe's task {path.stem!r} has no questions: expected them in {path}") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise RecipeError(f"{path} is not a task: expected JSON lines with a prompt and an answer") from None


def bundle_right(bundle: Path, task: Task, on_cpu: bool = False) -> list[bool]:
    """Which answers a bundle gets exactly right, through onnxruntime-genai."""
    tokenizer = Tokenizer.from_file(str(bundle / names.TOKENIZER_FILE))
    return _right(task, tokenizer, continuations(bundle, _encode(task, tokenizer), _NEW_TOKENS, on_cpu))


def reference_right(checkpoint: Checkpoint, source: Tensors, stop_ids: set[int], task: Task) -> list[bool]:
    """Which answers the reference forward gets right with the tensors of `source`."""
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / names.TOKENIZER_FILE))
    made = greedy_continuations(checkpoint.config, source, _encode(task, tokenizer), _NEW_TOKENS, stop_ids)
    return _right(task, tokenizer, made)


def _encode(task: Task, tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in task.prompts]


def _right(task: Task, tokenizer: Tokenizer, made: list[list[int]]) -> list[bool]:
    right = []
    for ids, answer in zip(made, task.answers, strict=True):
        _, thought, text = tokenizer.decode(ids, skip_special_tokens=True).partition(_END_OF_THOUGHT)
        right.append(bool(thought) and text.strip() == answer)
    return right
