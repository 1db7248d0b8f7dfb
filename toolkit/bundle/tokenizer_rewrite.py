"""tokenizer.json written in another way that means the same, for onnxruntime-genai, whose splits are a list of known
expressions; and with the added tokens that other files of the checkpoint list.

What is done here is proven for each tokenizer where it is tried (evaluate/encodes.py): `tokenizers` must encode as
before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

_SPLIT: Final = {"type": "Split", "behavior": "Isolated", "invert": False}
_DIGIT: Final = r"\p{N}"
# ByteLevel's own expression, GPT-2's.
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Alternatives of published expressions, and those that match the same and are known. Possessive ones never give back
# what would let the rest match; `\s*` takes line ends along, so that one or more of them are asked for alike.
_ALIKE: Final = {
    "'(?i:[sdmt]|ll|ve|re)": "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"[^\r\n\p{L}\p{N}]?+\p{L}+": r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?+\p{L}++": r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"\p{N}{1,3}+": r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]++[\r\n]*": r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]++[\r\n]*+": r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]": r"\s*[\r\n]+",
}


def with_tokens(tokenizer: Mapping[str, Any], tokens: Mapping[str, int]) -> dict[str, Any]:
    """tokenizer.json with more added tokens, by their texts, which are taken as they stand in a text."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    more = [{"id": number, "content": text, **plain, "special": True} for text, number in tokens.items()]
    listed = [*(tokenizer.get("added_tokens") or []), *more]
    return {**tokenizer, "added_tokens": sorted(listed, key=lambda token: int(token["id"]))}


def with_known_splits(tokenizer: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """tokenizer.json with its splits in the words that onnxruntime-genai knows, and what was written otherwise."""
    given = tokenizer.get("pre_tokenizer")
    sequence = isinstance(given, dict) and given.get("type") == "Sequence"
    parts = given.get("pretokenizers") if isinstance(given, dict) and sequence else [given]
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return {**tokenizer}, ()
    changes: list[str] = []
    digits = any(_is_digits(part) for part in parts)
    written = [new for part in parts for new in _written(part, digits, changes)]
    splits = {"type": "Sequence", "pretokenizers": written}
    return {**tokenizer, "pre_tokenizer": splits if changes else given}, tuple(dict.fromkeys(changes))


def _is_digits(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "Digits" and part.get("individual_digits") is True


def _written(part: Mapping[str, Any], digits: bool, changes: list[str]) -> Iterator[Mapping[str, Any]]:
    """What stands in place of a part; `digits` is whether another of them takes each digit by itself."""
    pattern = part.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if part.get("type") == "Split" and isinstance(regex, str):
        known = "|".join(_ALIKE.get(one, one) for one in _alternatives(regex))
        if known != regex:
            changes.append("an expression of splits is written in alternatives that match the same")
        yield {**part, "pattern": {"Regex": known}}
    elif _is_digits(part):
        changes.append("digits are split by an expression")
        yield {**_SPLIT, "pattern": {"Regex": _DIGIT}}
    elif digits and part.get("type") == "ByteLevel" and part.get("use_regex", True) and not part["add_prefix_space"]:
        yield {**_SPLIT, "pattern": {"Regex": _GPT2}}
        yield {**part, "use_regex": False}
    else:
        yield part


def _alternatives(regex: str) -> list[str]:
    """The alternatives of an expression, those in groups and sets left together."""
    found, depth, inside, k = [""], 0, False, 0
    while k < len(regex):
        sign = regex[k : k + 2] if regex[k] == "\\" else regex[k]
        k += len(sign)
        if inside:
            inside = sign != "]"
        elif sign in "([)":
            depth += (sign == "(") - (sign == ")")
            inside = sign == "["
        if sign == "|" and not depth and not inside:
            found.append("")
        else:
            found[-1] += sign
    return found
