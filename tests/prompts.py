"""Prompts of random tokens at the lengths where windows begin and end, and what the reference answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from toolkit.checkpoint.opened import open_checkpoint
from toolkit.reference.greedy import greedy_continuations

NEW_TOKENS = 32


def prompt_lengths(window: int) -> tuple[int, ...]:
    """Below, at and above whole windows."""
    return (1, window - 1, window, window + 1, 2 * window, 2 * window + 3)


def prompt_of(length: int) -> list[int]:
    """Random ids, neither eos nor pad; the seed is one whose continuations are long."""
    return [int(i) for i in np.random.default_rng([10, length]).integers(0, 700, length)]


def reference_tokens(checkpoint: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The exact model's greedy tokens after each prompt, ended by its end-of-sequence tokens."""
    opened = open_checkpoint(checkpoint)
    return greedy_continuations(opened.config, opened.source, prompts, new_tokens, set(opened.config.eos_token_ids))
