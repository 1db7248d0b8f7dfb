"""The shapes of published tokenizers, made small: normalizer, splits, model, decoder and added tokens as in their
tokenizer.json, over a vocabulary of a few hundred tokens that is trained on a page of text.

What is written down here are settings, and which models have them; no file is copied. `differs` is what
onnxruntime-genai makes of each: nothing where it encodes every probe text as `tokenizers` does, else the kinds of text
that it does not, which the manifest then names, or `REFUSED` where an export says in a line that it cannot be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

REFUSED: Final = "refused"
# What genai does otherwise, and so the reason for each exception.
APART: Final = "letters apart from their accents"  # normalizers of byte-level BPE are passed over
CJK: Final = "Chinese, Japanese, Korean"
WIDTH: Final = "signs of one width"
EVERY_TOKEN: Final = "every added token"
_PAGE: Final = [
    "The quick brown fox jumps over the lazy dog. 1234567890 It's we'll don't I'm they've",
    "def f(x):\n    return x + 1\n\n\tif a == b:\n        pass\n",
    "你好，世界！这是一个测试。日本語のテキスト。안녕하세요",
    "naïve café ÀÉÎÕÜ ﬁ Å Ω привет ΑΒΓ",
    "🙂👩‍👩‍👧 emoji ✨",
    "<think> thought </think> answer  two  spaces   three",
    "https://example.com/a?b=c&d=e 3.14159 1,000,000 $5.00",
] * 6
_BYTES: Final = pre_tokenizers.ByteLevel.alphabet()
# Alternatives that many published expressions share.
_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+END|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*END"
)
_SLASHED: Final = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
QWEN2: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
QWEN35: Final = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K: Final = rf"{_CASED.replace('END', _CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_SLASHED}"
TEKKEN: Final = rf"{_CASED.replace('END', '')}|\p{{N}}|{_SLASHED}"
CL100K: Final = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
EXAONE: Final = r"(?:'[sdmt]|'ll|'ve|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
BLOOM: Final = r" ?[^(\s|[.,!?…。，、।۔،])]+"
DEEPSEEK3: Final = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
)
DEEPSEEK2: Final = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")


@dataclass(frozen=True)
class Shape:
    """One published kind of tokenizer: who has it, how to make it, its class, and what comes of it in genai."""

    name: str
    make: Callable[[], Tokenizer]
    differs: tuple[str, ...] | str = ()
    tokenizer_class: str = "PreTrainedTokenizerFast"
    config: dict[str, object] = field(default_factory=dict)


def _splits(*expressions: str, first: Sequence[pre_tokenizers.PreTokenizer] = ()) -> pre_tokenizers.PreTokenizer:
    """Splits by expressions, then bytes."""
    parts = [*first, *(pre_tokenizers.Split(Regex(one), "isolated") for one in expressions)]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2(*first: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """GPT-2's own expression, behind other splits."""
    own = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([*first, own]) if first else own


def _finished(made: Tokenizer, trainer: trainers.Trainer, added: Sequence[AddedToken]) -> Tokenizer:
    made.train_from_iterator(_PAGE, trainer)
    return _with_tokens(made, added)


def _with_tokens(made: Tokenizer, added: Sequence[AddedToken]) -> Tokenizer:
    """With the tokens of a chat, which every shape has, and others."""
    chat = [AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>")]
    made.add_special_tokens(chat)
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    for token in added:
        (made.add_special_tokens if token.special else made.add_tokens)([token])
    return made


def byte_level(
    splits: pre_tokenizers.PreTokenizer,
    normalizer: normalizers.Normalizer | None = None,
    added: Sequence[AddedToken] = (),
    ignore_merges: bool = False,
    bos: bool = False,
) -> Callable[[], Tokenizer]:
    """BPE over bytes."""

    def make() -> Tokenizer:
        made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
        made.pre_tokenizer, made.decoder = splits, decoders.ByteLevel()
        if normalizer is not None:
            made.normalizer = normalizer
        trainer = trainers.BpeTrainer(
            vocab_size=700, initial_alphabet=_BYTES, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False
        )
        _finished(made, trainer, added)
        if bos:
            made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        return made

    return make


def sentencepiece(
    normalizer: normalizers.Normalizer | None = None,
    splits: pre_tokenizers.PreTokenizer | None = None,
    strips: bool = True,
    added: Sequence[AddedToken] = (),
) -> Callable[[], Tokenizer]:
    """BPE over characters with bytes to fall back to, as sentencepiece's models are converted: trained on words and
    used on whole texts."""

    def make() -> Tokenizer:
        made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
        last = [decoders.Strip(" ", 1, 0)] if strips else []
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
        reserved = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=reserved[:3], show_progress=False)
        lines = [line for text in _PAGE for line in text.split("\n")]
        made.train_from_iterator(lines, trainer)
        raw = json.loads(made.to_str())
        first = made.get_vocab_size()
        raw["model"]["vocab"] |= {text: first + k for k, text in enumerate(reserved[3:])}
        raw["pre_tokenizer"] = None
        made = _with_tokens(Tokenizer.from_str(json.dumps(raw)), added)
        if normalizer is not None:
            made.normalizer = normalizer
        if splits is not None:
            made.pre_tokenizer = splits
        return made

    return make


def unigram(normalizer: normalizers.Normalizer | None = None) -> Callable[[], Tokenizer]:
    """Pieces with scores, as T5 and XLM-RoBERTa have them."""

    def make() -> Tokenizer:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        if normalizer is not None:
            made.normalizer = normalizer
        special = ["<pad>", "</s>", "<unk>"]
        trainer = trainers.UnigramTrainer(
            vocab_size=300, unk_token="<unk>", special_tokens=special, show_progress=False
        )
        return _finished(made, trainer, ())

    return make


def _wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]"], show_progress=False)
    return _finished(made, trainer, ())


def _wordlevel() -> Tokenizer:
    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return _finished(made, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False), ())


def _without_bytes() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return _finished(made, trainers.BpeTrainer(special_tokens=["<unk>"], vocab_size=500, show_progress=False), ())


def _clip() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(words, "removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        end_of_word_suffix="</w>",
        initial_alphabet=_BYTES,
        special_tokens=["<unk>"],
        show_progress=False,
    )
    return _finished(made, trainer, ())


def _token(text: str, special: bool = True, **how: bool) -> AddedToken:
    return AddedToken(text, special=special, **{"normalized": False, **how})


_NFC: Final = normalizers.NFC()
_DIGITS: Final = pre_tokenizers.Digits(individual_digits=True)
_PREPEND: Final = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
_SPACES: Final = [AddedToken(" " * n, special=False, normalized=True) for n in (4, 3, 2)]
_DEEPSEEK: Final = [
    _token(text, special=text.startswith(("<｜b", "<｜e")))
    for text in ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
]
SHAPES: Final = (
    Shape("GPT-2, OPT, Cerebras-GPT", byte_level(_gpt2()), tokenizer_class="GPT2Tokenizer"),
    Shape(
        "GPT-NeoX, Pythia, OLMo 1, MPT",
        byte_level(_gpt2(), _NFC, _SPACES),
        (APART,),
        tokenizer_class="GPTNeoXTokenizer",
    ),
    Shape("Phi-1, Phi-2, CodeGen", byte_level(_gpt2(), added=_SPACES), tokenizer_class="CodeGenTokenizer"),
    Shape("StarCoder, StarCoder2, Granite 3", byte_level(_gpt2(_DIGITS)), tokenizer_class="GPT2Tokenizer"),
    Shape("SmolLM, SmolLM2", byte_level(_gpt2(_DIGITS), added=[_token("<file_sep>")]), tokenizer_class="GPT2Tokenizer"),
    Shape("Command R", byte_level(_gpt2(_DIGITS), _NFC), (APART,), tokenizer_class="CohereTokenizer"),
    Shape(
        "RoBERTa, BART",
        byte_level(_gpt2(), added=[_token("<mask>", lstrip=True)]),
        ("added token <mask>",),
        tokenizer_class="RobertaTokenizer",
    ),
    Shape("GPT-2 with a space before all", byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), REFUSED),
    Shape("Llama 3, 3.1, 3.2, 3.3", byte_level(_splits(LLAMA3), ignore_merges=True, bos=True)),
    Shape(
        "DeepSeek-R1-Distill-Llama",
        byte_level(_splits(LLAMA3), added=_DEEPSEEK, ignore_merges=True, bos=True),
        tokenizer_class="LlamaTokenizerFast",
        config={"add_bos_token": True, "add_eos_token": False},
    ),
    Shape("SmolLM3", byte_level(_splits(LLAMA3), added=[_token("<tool_call>", special=False)], ignore_merges=True)),
    Shape("Phi-4, GLM-4, Kimi-VL", byte_level(_splits(LLAMA3)), tokenizer_class="GPT2Tokenizer"),
    Shape("Llama 3's splits without ignore_merges, MiniCPM 4", byte_level(_splits(LLAMA3))),
    Shape("Qwen1.5, Qwen2, Qwen2.5, QwQ", byte_level(_splits(QWEN2), _NFC), (APART,), tokenizer_class="Qwen2Tokenizer"),
    Shape(
        "Qwen3, Qwen3-Thinking",
        byte_level(_splits(QWEN2), _NFC, [_token("<tool_call>", special=False), _token("<|fim_pad|>")]),
        (APART,),
        tokenizer_class="Qwen2Tokenizer",
    ),
    Shape(
        "DeepSeek-R1-Distill-Qwen",
        byte_level(_splits(QWEN2), added=_DEEPSEEK, bos=True),
        tokenizer_class="LlamaTokenizerFast",
        config={"add_bos_token": True, "add_eos_token": False},
    ),
    Shape("Qwen2's splits without a normalizer", byte_level(_splits(QWEN2)), tokenizer_class="Qwen2Tokenizer"),
    Shape("Qwen3.5", byte_level(_splits(QWEN35), _NFC), (APART,), tokenizer_class="Qwen2Tokenizer"),
    Shape(
        "DeepSeek-V3, R1, V3.1",
        byte_level(_splits(*DEEPSEEK3), added=_DEEPSEEK),
        ("contractions", "code"),
        tokenizer_class="LlamaTokenizerFast",
    ),
    Shape(
        "DeepSeek LLM, Coder, V2",
        byte_level(_splits(*DEEPSEEK2, first=[]), added=_DEEPSEEK),
        REFUSED,
        tokenizer_class="LlamaTokenizerFast",
    ),
    Shape("Mistral Nemo, Small 3, Magistral, Ministral: tekken", byte_level(_splits(TEKKEN), ignore_merges=True)),
    Shape("tekken without ignore_merges, Nemotron", byte_level(_splits(TEKKEN))),
    Shape("gpt-oss, GPT-4o", byte_level(_splits(O200K))),
    Shape("OLMo 2, StableLM 2, Dolma: cl100k", byte_level(_splits(CL100K)), tokenizer_class="GPT2Tokenizer"),
    Shape("EXAONE", byte_level(_splits(EXAONE)), REFUSED),
    Shape("BLOOM", byte_level(_splits(BLOOM)), REFUSED, tokenizer_class="BloomTokenizerFast"),
    Shape(
        "Falcon",
        byte_level(
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Punctuation("contiguous"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                    pre_tokenizers.Digits(individual_digits=False),
                    pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
                ]
            )
        ),
        ("code", "leading spaces", "markers"),
    ),
    Shape(
        "AFM, numbers in threes from the right", byte_level(_splits(r"\d{1,3}(?=(?:\d{3})*\b)", LLAMA3)), ("digits",)
    ),
    Shape("Qwen2 + NFKC", byte_level(_splits(QWEN2), normalizers.NFKC()), (CJK, APART, WIDTH)),
    Shape("Qwen2 + NFD", byte_level(_splits(QWEN2), normalizers.NFD()), (CJK, "accents", WIDTH)),
    Shape("Qwen2 + lower case", byte_level(_splits(QWEN2), normalizers.Lowercase()), REFUSED),
    Shape(
        "Qwen2 + no accents",
        byte_level(_splits(QWEN2), normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
        (CJK, "accents", APART, WIDTH),
    ),
    Shape("Qwen2 + a character replaced", byte_level(_splits(QWEN2), normalizers.Replace(" ", "_")), REFUSED),
    Shape("Llama 3 + NFC", byte_level(_splits(LLAMA3), _NFC, ignore_merges=True), (APART,)),
    Shape(
        "added token, lstrip", byte_level(_splits(QWEN2), added=[_token("<|x|>", lstrip=True)]), ("added token <|x|>",)
    ),
    Shape("added token, rstrip", byte_level(_splits(QWEN2), added=[_token("<|x|>", rstrip=True)])),
    Shape(
        "added token, both",
        byte_level(_splits(LLAMA3), added=[_token("<|x|>", lstrip=True, rstrip=True)]),
        ("added token <|x|>",),
    ),
    Shape(
        "added token, single word",
        byte_level(_splits(QWEN2), added=[_token("foo", special=False, single_word=True)]),
        ("added token foo",),
    ),
    Shape(
        "added token, normalized", byte_level(_splits(QWEN2), added=[_token("Ünder", special=False, normalized=True)])
    ),
    Shape(
        "added token of another script",
        byte_level(_splits(LLAMA3), added=[_token("<用户>"), _token("🙂", special=False)]),
    ),
    Shape(
        "added tokens that begin alike",
        byte_level(_splits(QWEN2), added=[_token("<|im|>"), _token("<|im"), _token("<|im_st")]),
    ),
    Shape(
        "Llama 2, TinyLlama, Vicuna, Zephyr",
        sentencepiece(_PREPEND),
        tokenizer_class="LlamaTokenizer",
        config={"legacy": False},
    ),
    Shape(
        "Mistral 7B 0.1 and 0.2, Mixtral",
        sentencepiece(_PREPEND),
        tokenizer_class="LlamaTokenizer",
        config={"add_bos_token": True, "add_eos_token": False},
    ),
    Shape(
        "Mistral 7B 0.3, Codestral",
        sentencepiece(None, pre_tokenizers.Metaspace("▁", "first", False)),
        ("leading spaces", "markers", "white space alone", EVERY_TOKEN),
        tokenizer_class="LlamaTokenizer",
    ),
    Shape(
        "Metaspace before every part",
        sentencepiece(None, pre_tokenizers.Metaspace("▁", "always", False)),
        ("leading spaces", "white space alone", EVERY_TOKEN),
        tokenizer_class="LlamaTokenizer",
    ),
    Shape(
        "Yi, no space before the text",
        sentencepiece(normalizers.Replace(" ", "▁"), strips=False),
        tokenizer_class="LlamaTokenizer",
    ),
    Shape(
        "InternLM 2",
        sentencepiece(None, pre_tokenizers.Metaspace("▁", "never", False), strips=False),
        tokenizer_class="LlamaTokenizer",
    ),
    Shape(
        "CodeLlama",
        sentencepiece(_PREPEND, added=[_token("▁<PRE>"), _token("▁<SUF>")]),
        tokenizer_class="CodeLlamaTokenizer",
    ),
    Shape(
        "SOLAR, OpenChat 3.5",
        sentencepiece(_PREPEND, added=[_token("<|end_of_turn|>")]),
        tokenizer_class="LlamaTokenizer",
    ),
    Shape(
        "Phi-3, Phi-3.5",
        sentencepiece(_PREPEND, added=[_token("<|end|>", rstrip=True), _token("<|user|>", rstrip=True)]),
        tokenizer_class="LlamaTokenizer",
    ),
    Shape(
        "Gemma 1, 2 and 3",
        sentencepiece(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), strips=False),
        tokenizer_class="GemmaTokenizer",
    ),
    Shape(
        "Llama 2 + NFKC",
        sentencepiece(normalizers.Sequence([normalizers.NFKC(), _PREPEND])),
        (CJK, APART, WIDTH),
        tokenizer_class="LlamaTokenizer",
    ),
    Shape("T5", unigram(normalizers.NFKC()), REFUSED, tokenizer_class="T5Tokenizer"),
    Shape("XLM-RoBERTa", unigram(), REFUSED, tokenizer_class="XLMRobertaTokenizer"),
    Shape("BERT: WordPiece", _wordpiece, REFUSED, tokenizer_class="BertTokenizer"),
    Shape("words alone", _wordlevel, REFUSED),
    Shape(
        "CLIP",
        _clip,
        ("contractions", "lines", "accents", APART, WIDTH, "white space alone"),
        tokenizer_class="CLIPTokenizer",
    ),
    Shape("BPE without bytes", _without_bytes, REFUSED),
)
