"""Where an answer ends: the union of what every file of a checkpoint says, each id with its sources.

Fine-tunes keep the base model's generation_config.json, tokenizers name another token than the config does, and a chat
template ends its turns with a marker that neither mentions. Each of these alone lets a bundle write on without an end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from toolkit.checkpoint.side_files import GENERATION_FILE, SideFiles, Vocabulary
from toolkit.errors import CheckpointError
from toolkit.names import CONFIG_FILE

# Tokens that end a turn in the published chat formats.
_END_OF_TURN: Final = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<|return|>",
    "<|call|>",
    "<｜end▁of▁sentence｜>",
)
# In gpt-oss' format `<|end|>` ends a message, of which an answer has several; the token that ends it is another.
_ENDS_MESSAGES: Final = {"<|end|>": "<|return|>"}


@dataclass(frozen=True)
class StopToken:
    """An id that ends an answer, its text if the tokenizer has one, and the files that say so."""

    id: int
    token: str
    sources: tuple[str, ...]


def stop_tokens(
    side: SideFiles, config_ids: tuple[int, ...], vocab_size: int, after_answer: str = ""
) -> list[StopToken]:
    """Every id that ends an answer, those of generation_config.json first.

    `config_ids` are config.json's, `after_answer` is what the chat template writes behind an answer. Raises
    CheckpointError if no file names any, or if one names an id without a row in the embedding.
    """
    found: dict[int, list[str]] = {}

    def name(token_id: int, source: str) -> None:
        if token_id >= vocab_size:
            raise CheckpointError(
                f"{source} ends answers with token {token_id}, expected ids below the config's vocab_size {vocab_size}"
            )
        sources = found.setdefault(token_id, [])
        if source not in sources:
            sources.append(source)

    for token_id in side.generation.eos_token_ids:
        name(token_id, GENERATION_FILE)
    for token_id in config_ids:
        name(token_id, CONFIG_FILE)
    vocabulary = side.vocabulary
    if vocabulary is not None:
        for file, text in side.eos_token.items():
            known = vocabulary.id_of(text)
            if known is not None:
                name(known, f"{file} (eos_token)")
        for text in _END_OF_TURN:
            message_end = _ENDS_MESSAGES.get(text) in vocabulary.added
            if any(text in template for template in side.templates) and text in vocabulary.added and not message_end:
                name(vocabulary.added[text], "the chat template")
        if (behind := _first_token(after_answer, vocabulary)) is not None:
            name(behind, "the chat template")
    if not found:
        raise CheckpointError(
            "no file of the checkpoint says where an answer ends: set eos_token_id in generation_config.json, or "
            "eos_token in tokenizer_config.json"
        )
    texts = {} if vocabulary is None else {k: v for v, k in {**vocabulary.tokens, **vocabulary.added}.items()}
    return [StopToken(token_id, texts.get(token_id, ""), tuple(sources)) for token_id, sources in found.items()]


def _first_token(text: str, vocabulary: Vocabulary) -> int | None:
    """The id of the added token that a text begins with, white space aside; None where it begins with none."""
    found = [token for token in vocabulary.added if token.strip() and text.lstrip().startswith(token)]
    return vocabulary.added[max(found, key=len)] if found else None
