"""Checkers against the ways in which answers are written, and the ways in which a grader is fooled."""

from __future__ import annotations

from fractions import Fraction

import pytest

from tests.gsm8k import GSM8K
from toolkit.evaluate.checkers import CHECKERS, default_checker, last_boxed, last_number, normal_form, stated_choice
from toolkit.evaluate.thought import after_thought

OPEN = "<｜User｜>Add 4 and 5.<｜Assistant｜><think>\n"


@pytest.mark.parametrize(
    ("prompt", "made", "text"),
    [
        (OPEN, "4 + 5 is 9.\n</think>\n9", "\n9"),
        (OPEN, "4 + 5 is 9. So 9", None),  # cut inside the thought: the 9 in it is no answer
        ("<｜Assistant｜>", "<think>\nhm</think>\n\n 9 ", "\n\n 9 "),
        ("<｜Assistant｜>", "<think>\n9", None),
        ("<｜Assistant｜>", "9", "9"),
        ("<｜Assistant｜><think>\n\n</think>\n\n", "9", "9"),  # thinking switched off by the template
        ("Q <think>a</think> A. Q <think>\n", "9", None),  # an example's thought has ended, the question's has not
        (OPEN, "</think>9</think>8", "9</think>8"),
        (OPEN, "hm</think>", ""),
    ],
)
def test_the_answer_is_what_follows_the_thought(prompt: str, made: str, text: str | None) -> None:
    assert after_thought(prompt, made) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("It is 42.", 42),
        ("$1,234.50 in all", Fraction("1234.5")),
        ("1,234,567.", 1234567),
        ("1{,}234", 1234),
        ("10,\\!000", 10000),
        ("1,2,3", 3),
        ("1.2.3", Fraction("1.2")),
        (".5 l", Fraction(1, 2)),
        ("7.50", Fraction("7.5")),
        ("10-5", 5),
        ("(4+6)-5", 5),
        ("1,2345", 2345),
        ("5 - 3", 3),
        ("x = -5", -5),
        ("(-3)", -3),
        ("−3", -3),
        ("-$5", -5),
        ("$-5", -5),
        ("US$20", 20),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("3 / 4", Fraction(3, 4)),
        ("2 1/2 cups", Fraction(5, 2)),
        ("in 2024 7/2", Fraction(7, 2)),
        ("7/0", 0),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("-\\dfrac34", Fraction(-3, 4)),
        ("\\frac{-3}{4}", Fraction(-3, 4)),
        ("1\\frac{1}{2}", Fraction(3, 2)),
        ("50\\%", 50),
        ("5kg", 5),
        ("**7**", 7),
        ("5 litres of H2O", 5),
        ("5\\text{ m}^2", 5),
        ("5\\text{ m}^{2}", 5),
        ("9 of x_1 and x_{2}", 9),
        ("答案是42。", 42),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text: str, value: Fraction | int | None) -> None:
    assert last_number(text) == value


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        (GSM8K, "She makes **$18** every day.", True),
        (GSM8K, "She makes $18.00.", True),
        (GSM8K, "16 - 3 - 4 = 9", False),
        (GSM8K, "\\boxed{18} dollars, from 9 eggs at 2", True),  # the box decides, not the last number
        (GSM8K, "\\boxed{9}, no, 18", False),
        (GSM8K, "18, as \\boxed{\\text{a sum}}", False),
        (GSM8K, "18 \\boxed{1", False),  # cut: a box that never closes is none, and what it began stands last
        (GSM8K, "", False),
        ("#### 1,080", "1080", True),
        ("#### -5", "5", False),
        ("0.5", "1/2", True),
        ("1/3", "0.333", False),
        ("18", "118", False),
        ("18", "18.5", False),
    ],
)
def test_number_goes_by_value(answer: str, text: str, right: bool) -> None:
    assert CHECKERS["number"].is_right(text, answer) is right


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("so \\boxed{\\frac{1}{\\sqrt{2}}}.", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{1} or rather \\boxed{2}", "2"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\left\\{x\\right.} }", "\\left\\{x\\right."),  # a lone escaped brace does not count
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\fbox{5}", "5"),
        ("\\boxed {5}", "5"),
        ("\\boxed{1} and \\boxed{\\frac{1}{2", None),
        ("\\boxed5", None),
        ("{5}", None),
    ],
)
def test_the_last_box_with_its_braces_matched(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    "spellings",
    [
        ("\\frac{1}{2}", "\\dfrac{1}{2}", "\\frac12", "1/2", "0.5", ".5"),
        ("10,080", "10{,}080", "10,\\!080", "10080", "10080.", "x=10080", "n = 10080"),
        ("12", "12\\text{ cm}", "12\\text{ cm}^2", "12\\,\\mathrm{cm}^{2}", "12 \\mbox{ inches}", "12.0"),
        ("(1,2)", "\\left(1, 2\\right)", "(1,\\,2)"),
        ("90", "90^\\circ", "90^{\\circ}", "90°"),
        ("18", "\\$18", "18\\%", "18%"),
        ("\\sqrt{3}", "\\sqrt3"),
        ("\\frac{\\pi}{2}", "\\pi/2", "\\dfrac{\\pi}2"),
        ("Evelyn", "\\text{Evelyn}", "\\text{ Evelyn }"),
        ("\\frac{a+b}{\\sqrt{2}}", "\\dfrac{a+b}{\\sqrt2}"),
    ],
)
def test_spellings_of_one_thing_have_one_form(spellings: tuple[str, ...]) -> None:
    assert {normal_form(text) for text in spellings} == {normal_form(spellings[0])}
    assert all(CHECKERS["boxed"].is_right(f"so \\boxed{{{text}}}", spellings[0]) for text in spellings)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,2,3", "123"),
        ("(1,2)", "(2,1)"),
        ("[1,2)", "(1,2)"),
        ("\\frac12", "\\frac21"),
        ("-1/2", "1/2"),
        ("3", "13"),
        ("\\sqrt{3}", "3"),
        ("2\\sqrt{3}", "\\sqrt{3}"),
        ("p - q", "q - p"),
        ("x^2", "x2"),
        ("123_4", "1234"),
        ("A", "a"),
        ("\\leftarrow", "arrow"),
        ("a=b=c", "b=c"),
    ],
)
def test_different_things_stay_different(one: str, other: str) -> None:
    assert normal_form(one) != normal_form(other)


def test_boxed_needs_a_box_in_the_text_alone() -> None:
    boxed = CHECKERS["boxed"]
    assert boxed.is_right("\\boxed{\\frac{3}{4}}", "We add. \\boxed{\\dfrac34}") and boxed.is_right("\\boxed{7}", "7")
    assert not boxed.is_right("7", "7") and not boxed.is_right("\\boxed{}", "7")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("(C)", "C"),
        ("**C**", "C"),
        ("\\boxed{C}", "C"),
        ("\\boxed{\\text{(c)}}", "C"),
        ("\\boxed{C) 5}", "C"),
        ("The answer is (C).", "C"),
        ("**Answer:** B", "B"),
        ("**Answer**: B", "B"),
        ("Answer: $\\text{D}$", "D"),
        ("The correct answer is option D.", "D"),
        ("Option A is correct.", "A"),
        ("C. Paris, since B is in Spain", "C"),
        ("B is wrong. The answer is C because A and B are not.", "C"),
        ("The answer is not B but C", "C"),
        ("A bakery sells bread, so C.", "C"),
        ("A) no\nB) no\nSo D", "D"),
        ("A, B and C are wrong. D.", "D"),
        ("\\boxed{B}, though the answer is C", "B"),
        ("A bakery", None),
        ("Dogs and Cats", None),
        ("", None),
    ],
)
def test_the_letter_a_text_settles_on(text: str, letter: str | None) -> None:
    assert stated_choice(text) == letter
    assert CHECKERS["choice"].is_right(text, "C") is (letter == "C") is CHECKERS["choice"].is_right(text, "(c)")


def test_exact_is_the_whole_text() -> None:
    exact = CHECKERS["exact"]
    assert exact.is_right(" 9\n", "9") and exact.is_right("9", "9\n")
    assert not exact.is_right("It is 9", "9") and not exact.is_right("9.0", "9")


def test_published_answers_name_their_checker() -> None:
    found = [default_checker(answer) for answer in (GSM8K, "so \\boxed{5}.", "1105", "#### A heading\nand text")]
    assert found == ["number", "boxed", "exact", "exact"]


@pytest.mark.parametrize(
    ("checker", "answer"), [("number", "none"), ("choice", "E"), ("choice", "A bakery"), ("boxed", "")]
)
def test_an_answer_that_a_checker_cannot_read_is_none(checker: str, answer: str) -> None:
    assert CHECKERS[checker].expected(answer) is None
