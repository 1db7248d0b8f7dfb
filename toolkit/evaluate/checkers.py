r"""Whether an answer is right: pure functions on text, one pair for each way of writing answers.

`exact`   the whole answer equals the expected one
`number`  a number of the same value: the one in \boxed{} where there is a box, else the last one
`boxed`   the same content of the last \boxed{}, LaTeX's spellings of one thing made one
`choice`  the same letter, A to D
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

# GSM8K's published answers: the way there, then this and the number.
_GSM8K: Final = re.compile(r"####\s*(\S+)\s*$")

_DIGITS: Final = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# Not inside a word (H2O), nor an exponent or index (m^2, x_{1}), nor the rest of a number; a minus between two operands
# is no sign.
_NUMBER: Final = re.compile(
    r"(?<![A-Za-z0-9^])(?<![0-9]\.)(?<!\^\{)(?<!\w_)(?<!\w_\{)"
    r"(?P<sign>(?<![)\]}])-)?"
    rf"(?:(?:(?P<whole>[0-9]+)\ )?(?P<over>[0-9]+)\ ?/\ ?(?P<under>[1-9][0-9]*)|(?P<plain>{_DIGITS}))"
)
_CURRENCY: Final = re.compile(r"\\?[$€£]")
_LATEX_FRACTION: Final = re.compile(
    r"(?P<whole>[0-9]?)\\[dtc]?frac\s*(?:\{\s*(?P<over>-?[0-9]+)\s*\}|(?P<o>[0-9]))\s*(?:\{\s*(?P<under>[0-9]+)\s*\}|(?P<u>[0-9]))"
)

_WRAPPED: Final = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT: Final = re.compile(rf"(?<=[0-9)}}])(?:\\[ ,;:!]|[\s~])*{_WRAPPED.pattern}(?:\^\{{?[0-9]\}}?)?$")
_NOTHING: Final = re.compile(
    r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[!,;: ]|\^\{?\\circ\}?|°|\\?[%$]|[\s~]"
)
_BARE_ARGUMENTS: Final = re.compile(r"\\frac(?:\{([^{}]*)\}|([^{}\\]))(?:\{([^{}]*)\}|([^{}\\]))")
_ONE_SLASH: Final = re.compile(r"(-?)([A-Za-z0-9\\]+)/([0-9]+)")

_STATED: Final = re.compile(r"(?i:answer)[*_]*\s*(?i:is\b|:)[\W_]*(?:(?i:option|choice)[\W_]+)?([A-D])(?![A-Za-z0-9'])")
_LEADING: Final = re.compile(r"[\W_]*([A-D])[.):*]")
# A capital that stands alone; `A` before a word is an article unless the word goes on about the choice.
_ALONE: Final = re.compile(
    r"(?<![A-Za-z0-9\\'])(?!A\s+(?!(?:is|was|and|or|because|since)\b)[a-z])([A-D])(?![A-Za-z0-9'])"
)
_LETTER: Final = re.compile(r"[\W_]*([A-Da-d])[\W_]*")


@dataclass(frozen=True)
class Checker:
    """`expected` reads a task's answer, `found` the text after the thought; None is an answer that is not there."""

    expected: Callable[[str], Hashable | None]
    found: Callable[[str], Hashable | None]

    def is_right(self, text: str, answer: str) -> bool:
        """Returns whether a text gives the answer; a text that gives none is wrong."""
        value = self.found(text)
        return value is not None and value == self.expected(answer)


def default_checker(answer: str) -> str:
    r"""Returns the checker for a published answer that names none: GSM8K's `#### 42` is a number, MATH's solution is
    boxed."""
    if _GSM8K.search(answer):
        return "number"
    return "boxed" if last_boxed(answer) is not None else "exact"


def last_number(text: str) -> Fraction | None:
    r"""Returns the last number: 1,234 and 1{,}234, -3/4 and \frac34, 2 1/2, .5, each with or without currency or
    percent."""
    text = text.replace("\\!", "").replace("\\,", "").replace("{,}", ",").replace("−", "-")
    text = _CURRENCY.sub(lambda sign: "" if text[max(sign.start() - 1, 0)] == "-" else " ", text)
    text = _LATEX_FRACTION.sub(_as_slash, text)
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last \boxed{…} or \fbox{…}, braces inside it matched, escaped ones aside.

    None if there is no box, or if the last one never closes, as in a text that was cut.
    """
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    opened = re.compile(r"\\(?:boxed|fbox)\s*\{").match(text, start) if start >= 0 else None
    if opened is None:
        return None
    depth, k = 1, opened.end()
    while k < len(text):
        if text[k] == "\\":
            k += 1
        elif text[k] in "{}":
            depth += 1 if text[k] == "{" else -1
            if not depth:
                return text[opened.end() : k]
        k += 1
    return None


def normal_form(latex: str) -> str:
    r"""Returns one spelling for what graders of MATH take as equal; numbers by value.

    Spaces, \left and \right, units in \text, degrees, percent, dollars, a final full stop and `x =` go; \dfrac, \frac12
    and 1/2 are one, \sqrt3 and \sqrt{3}. After Hendrycks et al., Measuring Mathematical Problem Solving (2021).
    """
    text = _WRAPPED.sub(lambda wrapped: wrapped[1].strip(), _UNIT.sub("", latex.strip().rstrip(".")))
    # A separator of thousands is no space.
    text = _NOTHING.sub("", text.replace("{,}", ",").replace("−", "-"))
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = _BARE_ARGUMENTS.sub(lambda m: f"\\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", text)
    text = re.sub(r"\\sqrt([0-9A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"^[A-Za-z]=(?!.*=)", "", text)
    slashed = _LATEX_FRACTION.sub(_as_slash, text)
    if number := _NUMBER.fullmatch(slashed):
        return str(_value(number))
    return _ONE_SLASH.sub(r"\1\\frac{\2}{\3}", text) if _ONE_SLASH.fullmatch(text) else text


def stated_choice(text: str) -> str | None:
    r"""Returns the letter A to D a text settles on: in its box, after `answer is`, heading its one line, or the last
    alone."""
    if (box := last_boxed(text)) is not None:
        text = box
        if letter := _LETTER.fullmatch(_WRAPPED.sub(r"\1", box)):
            return letter[1].upper()
    text = _WRAPPED.sub(r"\1", text).strip()
    if stated := _STATED.findall(text):
        return str(stated[-1])
    if "\n" not in text and (leading := _LEADING.match(text)):
        return leading[1]
    alone = _ALONE.findall(text)
    return str(alone[-1]) if alone else None


def _exact(text: str) -> str:
    return text.strip()


def _expected_number(answer: str) -> Fraction | None:
    published = _GSM8K.search(answer)
    return _found_number(published[1] if published else answer)


def _found_number(text: str) -> Fraction | None:
    box = last_boxed(text)
    return last_number(text if box is None else box)


def _expected_boxed(answer: str) -> str | None:
    box = last_boxed(answer)
    return normal_form(answer if box is None else box) or None


def _found_boxed(text: str) -> str | None:
    box = last_boxed(text)
    return None if box is None else normal_form(box)


def _expected_choice(answer: str) -> str | None:
    letter = _LETTER.fullmatch(answer)
    return letter[1].upper() if letter else None


def _as_slash(fraction: re.Match[str]) -> str:
    over, under = fraction["over"] or fraction["o"], fraction["under"] or fraction["u"]
    return f"{fraction['whole']} {over}/{under}" if fraction["whole"] else f"{over}/{under}"


def _value(number: re.Match[str]) -> Fraction:
    if number["plain"]:
        value = Fraction(number["plain"].replace(",", ""))
    else:
        value = Fraction(int(number["over"]), int(number["under"]))
        if number["whole"] and value < 1:  # 2 1/2, but not `in 2024 7/2`
            value += int(number["whole"])
    return -value if number["sign"] else value


CHECKERS: Final = {
    "exact": Checker(_exact, _exact),
    "number": Checker(_expected_number, _found_number),
    "boxed": Checker(_expected_boxed, _found_boxed),
    "choice": Checker(_expected_choice, stated_choice),
}
