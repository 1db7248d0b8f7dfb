"""Greedy answers with the transformer in QNN's simulator, window by window instead of token by token.

The CPU drafts an answer, which takes no time; the simulator reads it in windows and says at each position which token
it would have given. Up to the first that differs both are the same answer; from there the CPU drafts anew. What is left
in the end is what the simulator answers by itself, for a fifth of the time (LOG.md).
T tokens, S window, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit.evaluate.positions import Pipeline
from toolkit.evaluate.simulator import simulated_hidden

Draft = Callable[[Sequence[list[int]], int], list[list[int]]]


class Judge(Protocol):
    """Says which token follows each position of each sequence."""

    def __call__(self, sequences: Sequence[list[int]]) -> list[list[int]]: ...


def drafted_answers(
    prompts: Sequence[list[int]], new_tokens: int, stop_ids: Collection[int], draft: Draft, judge: Judge
) -> list[list[int]]:
    """What the judge answers greedily to each prompt, ended by (and including) a stop id or after `new_tokens`.

    `draft` continues prompts by so many tokens at most; the fewer of its tokens the judge agrees with, the longer it
    takes, and nothing else.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    open_ones = list(range(len(prompts)))
    while open_ones:
        drafts = draft([prompts[k] + answers[k] for k in open_ones], new_tokens)
        given = [(answers[k] + made)[:new_tokens] for k, made in zip(open_ones, drafts, strict=True)]
        chosen = judge([prompts[k] + answer for k, answer in zip(open_ones, given, strict=True)])
        still_open = []
        for k, answer, follows in zip(open_ones, given, chosen, strict=True):
            known = len(answers[k])
            answers[k] = _agreed(answer, follows[len(prompts[k]) - 1 :], known)
            # A draft without a token is one that the context's end allows none.
            if known < len(answers[k]) < new_tokens and answers[k][-1] not in stop_ids:
                still_open.append(k)
        open_ones = still_open
    return answers


def _agreed(answer: list[int], follows: list[int], known: int) -> list[int]:
    """The answer up to the first token that the judge would not have given, and the one it gives instead; all of it if
    there is none. `follows` starts with the token after the prompt, and the first `known` were agreed before."""
    for position in range(known, len(answer)):
        if follows[position] != answer[position]:
            return [*answer[:position], follows[position]]
    return answer


def simulator_judge(bundle: Path) -> Judge:
    """A bundle with its transformer in the simulator. Raises, when called, BundleError if it did not run."""
    pipeline = Pipeline(bundle, exact=True)

    def judge(sequences: Sequence[list[int]]) -> list[list[int]]:
        hidden: list[NDArray[Any]] = simulated_hidden(bundle, pipeline, sequences)
        best = [pipeline.head(ids, made).argmax(axis=-1) for ids, made in zip(sequences, hidden, strict=True)]
        return [np.asarray(tokens).tolist() for tokens in best]

    return judge
