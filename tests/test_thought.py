"""Thought and answer told apart while the text still arrives, and whole."""

from __future__ import annotations

import random

import pytest

from toolkit.evaluate.thought import Piece, ThoughtSplitter, after_thought, opens_thought

OPEN = "<｜User｜>Add 4 and 5.<｜Assistant｜><think>\n"
SHUT = "<｜User｜>Add 4 and 5.<｜Assistant｜>"
# (prompt, text, thought, answer)
CASES = [
    (OPEN, "4 + 5 = 9\n</think>\n\n9", "4 + 5 = 9\n", "\n\n9"),
    (SHUT, "<think>4 + 5</think>9", "4 + 5", "9"),
    (SHUT, "9", "", "9"),
    (OPEN, "never ends", "never ends", ""),
    (OPEN, "a < b and </ b </think>c <d", "a < b and </ b ", "c <d"),
    # Models talk about markers: what follows the first end is the answer, whatever it says.
    (OPEN, "x</think>write <think> and </think> around it", "x", "write <think> and </think> around it"),
    (OPEN, "x</think>", "x", ""),
    (SHUT, "ends in <thin", "", "ends in <thin"),
    (OPEN, "</think></think>", "", "</think>"),
    (SHUT + "<think>old</think>", "new", "", "new"),
]


def _joined(pieces: list[Piece], kind: str) -> str:
    return "".join(piece for piece in pieces if piece.kind == kind)


@pytest.mark.parametrize(("prompt", "text", "thought", "answer"), CASES)
@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_text_that_arrives_in_bits_is_split_as_the_whole_is(
    prompt: str, text: str, thought: str, answer: str, step: int
) -> None:
    splitter = ThoughtSplitter(prompt)
    pieces = [piece for k in range(0, len(text), step) for piece in splitter.add(text[k : k + step])]
    pieces += splitter.end()
    assert "".join(pieces) == text
    assert (_joined(pieces, "thought"), _joined(pieces, "answer")) == (thought, answer)


def test_random_bits_lose_nothing() -> None:
    generator = random.Random(0)
    for _ in range(500):
        text = "".join(generator.choice(["<think>", "</think>", "<", "</", "think>", "a", "\n"]) for _ in range(8))
        whole, bits = ThoughtSplitter(OPEN), ThoughtSplitter(OPEN)
        expected = [*whole.add(text), *whole.end()]
        found: list[Piece] = []
        rest = text
        while rest:
            cut = generator.randint(1, len(rest))
            found += bits.add(rest[:cut])
            rest = rest[cut:]
        found += bits.end()
        assert [_joined(found, kind) for kind in ("thought", "marker", "answer")] == [
            _joined(expected, kind) for kind in ("thought", "marker", "answer")
        ]


@pytest.mark.parametrize(("prompt", "text", "thought", "answer"), CASES)
def test_it_agrees_with_the_finished_text(prompt: str, text: str, thought: str, answer: str) -> None:
    whole = after_thought(prompt, text)
    if whole is None:
        assert answer == "" or "<think>" in text
    else:
        assert whole == answer


def test_what_is_certain_is_not_held_back() -> None:
    splitter = ThoughtSplitter(SHUT)
    assert [(piece, piece.kind) for piece in splitter.add("a <")] == [("a ", "answer")]
    assert [(piece, piece.kind) for piece in splitter.add("b")] == [("<b", "answer")]


def test_a_prompt_opens_a_thought_only_at_its_end() -> None:
    assert opens_thought(OPEN) and not opens_thought(SHUT) and not opens_thought("<think>x</think>")
