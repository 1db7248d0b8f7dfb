"""Questions for files that are no bundles: fresh ones of tiny-r1's kind by its generator, and how they are asked."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.peers.tool import PeerError
from toolkit import names
from toolkit.checkpoint.opened import Checkpoint
from toolkit.evaluate.answers import Asked
from toolkit.evaluate.tasks import Question, Task

_NEW_TOKENS = 300


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
    """The task as a checkpoint's own tokenizer and end tokens have it, prompts being whole."""
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / names.TOKENIZER_FILE))
    texts = tuple(question.text for question in task.questions)
    ids = tuple(tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
    rooms = (_NEW_TOKENS,) * len(ids)
    return Asked(task, texts, ids, rooms, _NEW_TOKENS, frozenset(checkpoint.config.eos_token_ids), tokenizer)
