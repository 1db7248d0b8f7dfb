"""What tokenizer.json holds, as far as it is written here: the keys and values that the `tokenizers` package reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from toolkit.typed_json import Json

# A normalizer, a pre-tokenizer, a post-processor or a decoder: its `type`, and the options that this type has.
Step = Mapping[str, Json]


class BpeModel(TypedDict):
    """The `model` that merges pairs of tokens into longer ones, `merges` in their order."""

    type: str
    dropout: float | None
    unk_token: str | None
    continuing_subword_prefix: str | None
    end_of_word_suffix: str | None
    fuse_unk: bool
    byte_fallback: bool
    ignore_merges: bool
    vocab: Mapping[str, int]
    merges: Sequence[str]


class AddedToken(TypedDict):
    """A token that is found in text before anything is cut or merged."""

    id: int
    content: str
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class TokenizerSteps(TypedDict):
    """What a text goes through on its way to ids, and ids on their way back."""

    normalizer: Step | None
    pre_tokenizer: Step | None
    post_processor: Step | None
    decoder: Step
    model: BpeModel


class TokenizerJson(TokenizerSteps):
    """The whole file, as `Tokenizer.from_file` reads it."""

    version: str
    truncation: Step | None
    padding: Step | None
    added_tokens: list[AddedToken]
