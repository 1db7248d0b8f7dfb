"""The reference's greedy answers to many prompts at once: each is what its prompt has alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.prompts import prompt_of
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.reference.greedy import greedy_continuations

NEW_TOKENS = 24


def test_prompts_that_end_in_the_midst_of_others_change_none_of_them(tiny_r1: Path) -> None:
    opened = open_checkpoint(tiny_r1)
    prompts = [prompt_of(length) for length in (5, 17, 1, 40, 8, 23, 3, 31, 12)]

    def continued(some: list[list[int]], stop_ids: set[int]) -> list[list[int]]:
        return greedy_continuations(opened.config, opened.source, some, NEW_TOKENS, stop_ids)

    whole = continued(prompts, set())
    # Ids that end several of them, one here and one there, while others go on.
    often = Counter(token for made in whole for token in set(made))
    stop_ids = {token for token, count in often.items() if 1 < count < 4}
    alone = [continued([prompt], stop_ids)[0] for prompt in prompts]
    assert len({len(made) for made in alone}) > 3
    assert continued(prompts, stop_ids) == alone
