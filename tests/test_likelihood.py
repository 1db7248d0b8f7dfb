"""The arithmetic behind lm-evaluation-harness, on a model of nine tokens whose every prefix has logits of its own."""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from toolkit.errors import RecipeError
from toolkit.evaluate.likelihood import Likelihood

# Longest first: a space belongs to the word after it, and `cd` is one token wherever it stands.
TOKENS = {" b": 1, "cd": 2, "a": 3, "b": 4, "c": 5, "d": 6, " ": 7}
BOS, PREFIX, V = 8, 0, 9


def encode(text: str, special: bool = True) -> list[int]:
    ids = [BOS] if special else []
    while text:
        token = next(token for token in TOKENS if text.startswith(token))
        ids.append(TOKENS[token])
        text = text[len(token) :]
    return ids


def row(prefix: list[int]) -> NDArray[np.float32]:
    """Logits after a prefix, which depend on all of it."""
    seed = int.from_bytes(hashlib.sha256(bytes(prefix)).digest()[:4], "little")
    return np.random.default_rng(seed).normal(0, 3, V).astype(np.float32)


def logits(ids: list[int]) -> NDArray[np.float32]:
    return np.stack([row(ids[: k + 1]) for k in range(len(ids))])


def expected(before: list[int], targets: list[int]) -> tuple[float, bool]:
    """A token at a time, in plain Python."""
    total, greedy, ids = 0.0, True, list(before)
    for target in targets:
        scores = [float(x) for x in row(ids)]
        total += scores[target] - math.log(math.fsum(math.exp(x) for x in scores))
        greedy &= max(range(V), key=scores.__getitem__) == target
        ids.append(target)
    return total, greedy


@pytest.fixture
def scorer() -> Likelihood:
    return Likelihood(logits, encode, PREFIX, 16)


@pytest.mark.parametrize(
    ("context", "continuation", "before", "targets"),
    [
        ("a", "b", [BOS, 3], [4]),
        ("a", " b", [BOS, 3], [1]),
        ("a ", "b", [BOS, 3], [1]),  # the space goes with the word
        ("ab", "acd", [BOS, 3, 4], [3, 2]),
        ("", "ab", [PREFIX], [3, 4]),
        (" ", "b", [PREFIX], [1]),
        ("ac", "d", [BOS, 3, 5], [6]),  # swallowed: `acd` has as many tokens as `ac`
    ],
)
def test_where_a_continuation_begins_and_what_it_weighs(
    scorer: Likelihood, context: str, continuation: str, before: list[int], targets: list[int]
) -> None:
    assert scorer.parted(context, continuation) == (before, targets)
    total, greedy = scorer.of_continuation(context, continuation)
    wanted, is_greedy = expected(before, targets)
    assert total == pytest.approx(wanted, abs=1e-6) and greedy == is_greedy
    # And again where the logits are remembered.
    assert scorer.of_continuation(context, continuation) == (total, greedy)


def test_greedy_means_every_token(scorer: Likelihood) -> None:
    letters, seen = {3: "a", 4: "b"}, 0
    for word in itertools.product("ab", repeat=7):
        context = "".join(word)
        first = int(row(encode(context)).argmax())
        second = int(row([*encode(context), first]).argmax())
        if first in letters and second in letters:
            seen += 1
            one, two = letters[first], letters[second]
            other_one, other_two = letters[7 - first], letters[7 - second]
            assert scorer.of_continuation(context, one + two)[1]
            assert not scorer.of_continuation(context, one + other_two)[1]
            assert not scorer.of_continuation(context, other_one + two)[1]
    assert seen > 3


def test_a_long_context_loses_its_beginning() -> None:
    short = Likelihood(logits, encode, PREFIX, 3)
    # Fed: the last three ids but one; the answer's two tokens are weighed after what is left of the context.
    assert short.of_continuation("abab", "ba")[0] == pytest.approx(expected([3, 4], [4, 3])[0], abs=1e-6)
    with pytest.raises(RecipeError, match="a continuation of 4 tokens is longer than the bundle's context of 3"):
        short.of_continuation("a", "baba")


def test_windows_are_those_of_the_harness(scorer: Likelihood) -> None:
    # The example in lm_eval/api/model.py, LM.loglikelihood_rolling: ids 0 to 9, a context of 4.
    short = Likelihood(logits, encode, -1, 4)
    assert list(short.windows(list(range(10)))) == [
        ([-1, 0, 1, 2], [0, 1, 2, 3]),
        ([3, 4, 5, 6], [4, 5, 6, 7]),
        ([5, 6, 7, 8], [8, 9]),
    ]
    assert list(short.windows([])) == [] and list(short.windows([5])) == [([-1], [5])]


def test_a_whole_text_is_the_sum_of_its_windows() -> None:
    ids = encode("abbacdab", special=False)
    whole = Likelihood(logits, encode, PREFIX, 16).of_text("abbacdab")
    assert whole == pytest.approx(expected([PREFIX], ids)[0], abs=1e-6)
    cut = Likelihood(logits, encode, PREFIX, 4).of_text("abbacdab")
    parts = expected([PREFIX], ids[:4])[0] + expected(ids[2:4], ids[4:])[0]
    assert len(ids) == 7 and cut == pytest.approx(parts, abs=1e-6) != pytest.approx(whole)
    assert Likelihood(logits, encode, PREFIX, 4).of_text("") == 0
