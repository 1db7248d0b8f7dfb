"""Fresh questions of tiny-r1's kind, by its own generator."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

from benchmarks.peers.tool import PeerError
from toolkit.validate.tasks import Task


def fresh_questions(generator: Path, count: int, seed: int) -> Task:
    """`count` questions from models/tiny-r1/generate.py. Raises PeerError if it is not there."""
    spec = importlib.util.spec_from_file_location("tiny_r1_generate", generator)
    if spec is None or spec.loader is None or not generator.is_file():
        raise PeerError(f"{generator} is missing: fresh questions come from the source tree's generator")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source = random.Random(seed)
    examples = [module.example(source) for _ in range(count)]
    prompts = tuple(str(module.prompt(example)) for example in examples)
    return Task(f"{count} fresh questions, seed {seed}", prompts, tuple(str(e["answer"]) for e in examples))
