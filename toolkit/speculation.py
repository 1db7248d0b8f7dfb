"""Rows of ways to decode several tokens a run: something cheap guesses the next ones, and the model checks all guesses
at once. What it does not agree with is thrown away, so that greedy answers stay the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

NONE: Final = "none"
NGRAM: Final = "ngram"
DRAFT: Final = "draft"
MTP: Final = "mtp"

# onnxruntime-genai's own words, in its `speculative` object.
SPECULATIONS: Final[Mapping[str, Mapping[str, int]]] = {
    NONE: {},
    NGRAM: {"max_draft_tokens": 4, "ngram_size": 3},
    DRAFT: {"max_draft_tokens": 4},
    # The head was trained to predict one token more, and is fed its own output for further ones.
    MTP: {"max_draft_tokens": 1},
}
# Those that have a graph of their own to guess with, beside the model's.
WITH_GRAPH: Final = (DRAFT, MTP)
# Positions of which a graph gives logits to be checked: the most guesses that onnxruntime-genai takes, and the token
# they follow.
CHECKED_ROWS: Final = 17
# Tokens of a prompt read at once: onnxruntime-genai wants room for the logits of them all, which of 1,024 tokens and
# Qwen's vocabulary are 622 MB.
CHUNK_SIZE: Final = 128
