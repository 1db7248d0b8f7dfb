"""Text as token sequences: what a bundle is judged on, and what its weights are calibrated on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from toolkit import names
from toolkit.bundle.chat_text import ChatText
from toolkit.checkpoint.opened import Checkpoint
from toolkit.errors import CheckpointError
from toolkit.files import is_unicode, read_text
from toolkit.recipe import data_folder, model_facts

LONGEST: Final = 512
_MAX_BYTES: Final = 1 << 30


def token_sequences(checkpoint: Checkpoint, text: Path, tokens: int, shortest: int) -> list[list[int]]:
    """Passages of a text as ids, until there are `tokens` in all or no more.

    Each is cut so that they reach every passage of a short text, but not below `shortest`. Random weights get seeded
    random ids. Raises CheckpointError for a text that holds none.
    """
    limit = min(checkpoint.config.longest_context, LONGEST)
    if checkpoint.synthetic:
        generator = np.random.default_rng(0)
        ids: NDArray[np.int64] = generator.integers(0, checkpoint.config.vocab_size, max(tokens, 64))
        return [ids[start : start + limit].tolist() for start in range(0, len(ids), limit)]
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / names.TOKENIZER_FILE))
    passages = _passages(text, checkpoint)
    limit = min(limit, max(shortest, tokens // max(len(passages), 1)))
    sequences: list[list[int]] = []
    for passage in passages:
        if sum(map(len, sequences)) >= tokens:
            break
        ids_of_text = tokenizer.encode(passage, add_special_tokens=False).ids[:limit]
        if len(ids_of_text) > 1:
            sequences.append(ids_of_text)
    if not sequences:
        raise CheckpointError(
            f"{text} holds no text: expected JSON lines with a `text`, a `prompt` or `messages`, or plain text"
        )
    return sequences


def find_text(name: str, recipe_name: str, target: str, checkpoint: Checkpoint) -> Path:
    """Returns the file of a text, named by its path, or by a name: a file of it beside the checkpoint, beside the
    model's facts, or among all models that come with the toolkit."""
    path = Path(name)
    if path.suffix or len(path.parts) > 1:
        return path
    facts = model_facts(recipe_name, target)
    folders = [checkpoint.folder, *([facts] if facts else []), data_folder("models")]
    return next((p for folder in folders if (p := folder / f"{name}.jsonl").is_file()), folders[-1] / f"{name}.jsonl")


def _passages(path: Path, checkpoint: Checkpoint) -> list[str]:
    """Each JSON line's `text`, its `prompt`, or its `messages` in the checkpoint's chat template; or the paragraphs of
    a plain file."""
    content = read_text(path, _MAX_BYTES, CheckpointError)
    if path.suffix != ".jsonl":
        return [part for part in content.split("\n\n") if part.strip()]
    try:
        # Not splitlines(), which also splits at separators that JSON strings may hold.
        lines = [json.loads(line) for line in content.split("\n") if line.strip()]
        if "\\u" in content and not is_unicode(lines):
            raise ValueError("half of a surrogate pair is no text")
        chat = ChatText(checkpoint) if any("messages" in line for line in lines) else None
        return [_passage(line, chat) for line in lines]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path} is not JSON lines with a `text`, a `prompt` or `messages` each") from None


def _passage(line: dict[str, Any], chat: ChatText | None) -> str:
    """Raises KeyError or TypeError for a line of another kind."""
    if chat is None or "messages" not in line:
        text = line["text"] if "text" in line else line["prompt"]
        if not isinstance(text, str):
            raise TypeError("a passage is text")
        return text
    messages = line["messages"]
    if not all(isinstance(turn["role"], str) and isinstance(turn["content"], str) for turn in messages):
        raise TypeError("a role and a content are texts")
    return chat.written(messages)
