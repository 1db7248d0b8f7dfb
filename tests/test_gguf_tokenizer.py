"""Tokenizers rebuilt from a GGUF file's metadata cut and merge as the published ones do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.gguf_files import bytes_to_unicode
from toolkit.checkpoint.gguf_metadata import Metadata
from toolkit.checkpoint.gguf_pre import PRE_TOKENIZERS
from toolkit.checkpoint.gguf_tokenizer import tokenizer_config_of, tokenizer_of

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED: dict[str, Any] = json.loads((ROOT / "tests" / "data" / "gguf_pre.json").read_text(encoding="utf-8"))


def _read(**tokenizer: Any) -> Metadata:
    values = {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    return Metadata({"general.architecture": "llama", "llama.context_length": 64, **values}, Path("m.gguf"))


def _tokenizer(read: Metadata) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_of(read)))


@pytest.mark.parametrize("pre", PUBLISHED["pre"])
def test_texts_are_cut_and_merged_as_the_published_tokenizer_does(pre: str) -> None:
    published = PUBLISHED["pre"][pre]
    read = _read(model="gpt2", pre=pre, tokens=published["tokens"], merges=published["merges"])
    tokenizer = _tokenizer(read)
    assert len(PUBLISHED["texts"]) == len(published["pieces"]) == 47
    for text, pieces in zip(PUBLISHED["texts"], published["pieces"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False).tokens == pieces, text


def test_patterns_of_one_name_are_not_anothers() -> None:
    """Or the test above would say nothing: three digits are one piece in Llama 3's, three in Qwen2's."""
    cut = {pre: PRE_TOKENIZERS[pre].to_json() for pre in ("qwen2", "llama-bpe", "tekken", "smollm", "gpt-2")}
    assert len({json.dumps(value) for value in cut.values()}) == 5
    letters = list(bytes_to_unicode().values())
    pieces = {}
    for pre in cut:
        tokenizer = _tokenizer(_read(model="gpt2", pre=pre, tokens=[*letters, "12", "ab"], merges=["1 2", "a b"]))
        assert tokenizer.pre_tokenizer is not None
        pieces[pre] = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("aB 123 it'S")]
    assert pieces == {
        "qwen2": ["aB", "Ġ", "1", "2", "3", "Ġit", "'S"],
        "llama-bpe": ["aB", "Ġ", "123", "Ġit", "'S"],
        "tekken": ["a", "B", "Ġ", "1", "2", "3", "Ġit", "'S"],
        "smollm": ["aB", "Ġ", "1", "2", "3", "Ġit", "'", "S"],
        "gpt-2": ["aB", "Ġ123", "Ġit", "'", "S"],
    }


def test_sentencepieces_merges_follow_from_scores(stories260k: Path) -> None:
    """Beside the tokenizer.json that the model was published with, on the project's own texts."""
    published = json.loads((stories260k / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = published["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.get)
    kinds = [2, 3, 3, *(6 if token.startswith("<0x") else 1 for token in tokens[3:])]
    scores = [0.0 if kind != 1 else -float(k) for k, kind in enumerate(kinds)]
    read = _read(model="llama", tokens=tokens, token_type=kinds, scores=scores, bos_token_id=1, eos_token_id=2)
    made, theirs = _tokenizer(read), Tokenizer.from_file(str(stories260k / "tokenizer.json"))
    texts = ["", " ", "  two", "naïve 日本語", "<s>", "a</s> b", "\n\n", "🙂"]
    for name in ("calibration.jsonl", "reasoning.jsonl"):
        whole = (ROOT / "models" / name).read_text(encoding="utf-8").replace("\\n", "\n")
        texts += [whole[start : start + 90] for start in range(0, len(whole), 90)]
    assert len(texts) > 500
    for text in texts:
        assert made.encode(text).ids == theirs.encode(text).ids, text
        assert made.decode(made.encode(text).ids) == theirs.decode(theirs.encode(text).ids)


def test_special_tokens_are_whole_and_stand_where_the_file_says() -> None:
    tokens = [*bytes_to_unicode().values(), "ab", "<|a|>", "<b>", "[PAD]"]
    kinds = [1] * 257 + [3, 4, 5]
    given = {"model": "gpt2", "pre": "qwen2", "tokens": tokens, "token_type": kinds, "merges": ["a b"]}
    ids = {"bos_token_id": 257, "eos_token_id": 257}
    plain = _tokenizer(_read(**given, **ids))
    assert plain.encode("ab<b>ab<|a|>").ids == [256, 258, 256, 257]
    assert plain.decode([256, 258, 256, 257]) == "ab<b>ab"  # what a user defined is text, what controls is none
    assert plain.token_to_id("[PAD]") is None
    begun = _read(**given, **ids, add_bos_token=True, add_eos_token=True)
    assert _tokenizer(begun).encode("ab").ids == [257, 256, 257]
    assert tokenizer_config_of(begun)["add_bos_token"] is True
    assert tokenizer_config_of(_read(**given, **ids))["bos_token"] == "<|a|>"


def test_llama_3_begins_its_texts_where_a_file_says_nothing() -> None:
    tokens = [*bytes_to_unicode().values(), "ab", "<|begin|>"]
    given = {"model": "gpt2", "tokens": tokens, "token_type": [1] * 257 + [3], "merges": ["a b"], "bos_token_id": 257}
    assert _tokenizer(_read(**given, pre="llama-bpe")).encode("ab").ids == [257, 256]
    assert _tokenizer(_read(**given, pre="qwen2")).encode("ab").ids == [256]
