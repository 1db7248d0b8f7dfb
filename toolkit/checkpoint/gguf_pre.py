"""How a byte-level BPE tokenizer cuts text before it merges, by the name that `tokenizer.ggml.pre` gives it.

Each row is what the published tokenizer.json of the models with that name has; llama.cpp's llama-vocab.cpp has the same
patterns, and leaves normalizers out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from toolkit.checkpoint.tokenizer_json import Step

_CONTRACTIONS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2: Final = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_LLAMA3: Final = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HAN: Final = "[一-龥ࠀ-一가-퟿]+"


@dataclass(frozen=True)
class PreTokenizer:
    """`splits` are patterns that cut one after the other, `digits` whether each digit then stands alone, `words`
    whether GPT-2's own pattern comes last; `nfc` whether text is normalized first. With `ignore_merges` a piece that is
    a token is one, whatever the merges say. `adds_bos` holds where a file does not say."""

    splits: tuple[str, ...] = ()
    digits: bool = False
    words: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False

    def to_json(self) -> Step:
        """Returns the `pre_tokenizer` of a tokenizer.json."""
        steps: list[Step] = [
            {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
            for split in self.splits
        ]
        if self.digits:
            steps.append({"type": "Digits", "individual_digits": True})
        steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": self.words})
        return {"type": "Sequence", "pretokenizers": steps}


_LLAMA3_ROW: Final = PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True)
_DIGITS_ROW: Final = PreTokenizer(digits=True, words=True)
PRE_TOKENIZERS: Final[dict[str, PreTokenizer]] = {
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN), digits=True),
    "deepseek-r1-qwen": PreTokenizer((_QWEN2,)),
    "gpt-2": PreTokenizer(words=True),
    "llama-bpe": _LLAMA3_ROW,
    "llama-v3": _LLAMA3_ROW,
    "llama3": _LLAMA3_ROW,
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    "refact": _DIGITS_ROW,
    "smaug-bpe": PreTokenizer((_LLAMA3,)),
    "smollm": _DIGITS_ROW,
    "starcoder": _DIGITS_ROW,
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, adds_bos=True),
}
