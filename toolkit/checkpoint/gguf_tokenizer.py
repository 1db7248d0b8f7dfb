"""A GGUF file's vocabulary as the tokenizer.json and tokenizer_config.json that its checkpoint would have.

`tokenizer.ggml.model` says which kind it is, whatever the architecture: `gpt2` is byte-level BPE with merges, `llama`
SentencePiece's BPE, whose merges follow from the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from toolkit.checkpoint.gguf_metadata import Metadata
from toolkit.checkpoint.gguf_pre import PRE_TOKENIZERS, PreTokenizer
from toolkit.checkpoint.tokenizer_json import AddedToken, BpeModel, Step, TokenizerJson, TokenizerSteps
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.typed_json import Json

# Kinds of tokens, as llama.h numbers them (enum llama_token_type).
_NORMAL: Final = 1
_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_UNUSED: Final = 5
_BYTE: Final = 6
_SPACE: Final = "▁"
_BYTE_LEVEL: Final = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def tokenizer_of(read: Metadata) -> TokenizerJson:
    """The tokenizer.json. Raises UnsupportedError for a kind that is not rebuilt, CheckpointError for tokens, kinds,
    merges or scores that do not belong together."""
    model = read.text("tokenizer.ggml.model", "none")
    build = _KINDS.get(model)
    if build is None:
        raise UnsupportedError(
            f"{read.path}: tokenizer.ggml.model {model[:40]!r} is not rebuilt, expected one of {', '.join(_KINDS)}"
        )
    tokens = read.texts("tokenizer.ggml.tokens")
    kinds = read.integers("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if not tokens or len(kinds) != len(tokens):
        raise CheckpointError(f"{read.path} has {len(tokens)} tokens and the kinds of {len(kinds)}, expected as many")
    vocab = {token: k for k, token in enumerate(tokens) if kinds[k] != _UNUSED}
    if len(vocab) < sum(kind != _UNUSED for kind in kinds):
        twice = next(token for k, token in enumerate(tokens) if kinds[k] != _UNUSED and vocab[token] != k)
        raise CheckpointError(f"{read.path}: the token {twice[:40]!r} stands twice in its vocabulary")
    parts = build(read, tokens, kinds, vocab)
    added: list[AddedToken] = [
        {
            "id": k,
            "content": tokens[k],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for k, kind in enumerate(kinds)
        if kind in (_CONTROL, _USER_DEFINED) or (kind not in (_NORMAL, _UNUSED, _BYTE))
    ]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts}


def tokenizer_config_of(read: Metadata) -> Mapping[str, Json]:
    """The tokenizer_config.json, with the chat template. Raises CheckpointError for a special token that is none."""
    tokens = read.texts("tokenizer.ggml.tokens")
    special = {
        f"{name}_token": tokens[token_id]
        for name, stored in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items()
        if (token_id := _special_id(read, stored, len(tokens))) is not None
    }
    template = {"chat_template": read.text(key)} if read.has(key := "tokenizer.chat_template") else {}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": _adds_bos(read),
        "add_eos_token": _adds_eos(read),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": read.count(".context_length"),
        **special,
        **template,
    }


def _special_id(read: Metadata, name: str, tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if not read.has(key):
        return None
    token_id = read.count(key, least=0)
    # The largest number there is means none.
    if token_id >= tokens:
        raise CheckpointError(f"{read.path}: {key} is {token_id}, and the vocabulary has {tokens} tokens")
    return token_id


def _bpe(read: Metadata, tokens: Sequence[str], kinds: Sequence[int], vocab: Mapping[str, int]) -> TokenizerSteps:
    """Byte-level BPE: merges as they stand, cut as the file's `pre` says."""
    pre = _pre_tokenizer(read)
    merges = read.texts("tokenizer.ggml.merges")
    pairs = [merge.partition(" ") for merge in merges]
    if not merges or any(not right or left not in vocab or right not in vocab for left, _, right in pairs):
        raise CheckpointError(f"{read.path}: tokenizer.ggml.merges holds none, or one of what is no token: damaged")
    template = _template(read, tokens)
    return {
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": pre.to_json(),
        "post_processor": {"type": "Sequence", "processors": [_BYTE_LEVEL, template]} if template else _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": _model(vocab, merges, ignore_merges=pre.ignore_merges),
    }


def _sentencepiece(
    read: Metadata, tokens: Sequence[str], kinds: Sequence[int], vocab: Mapping[str, int]
) -> TokenizerSteps:
    """SentencePiece's BPE: a space is a mark before its word, and what is no token is written in bytes."""
    scores = read.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise CheckpointError(f"{read.path} has {len(tokens)} tokens and the scores of {len(scores)}, expected as many")
    pieces = {token: scores[k] for token, k in vocab.items() if kinds[k] == _NORMAL}
    steps: list[Step] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    decoders: list[Step] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if read.flag("tokenizer.ggml.add_space_prefix", default=True):
        steps.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = next((token for token, k in vocab.items() if kinds[k] == 2), None)
    merges = [f"{left} {right}" for left, right in merges_by_score(pieces, vocab)]
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": _template(read, tokens),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {**_model(vocab, merges), "unk_token": unknown, "fuse_unk": True, "byte_fallback": _BYTE in kinds},
    }


def merges_by_score(pieces: Mapping[str, float], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges that make `pieces` out of pairs of them, the best score first.

    SentencePiece merges whichever neighbours make the piece of the highest score; pairs that make the same piece come
    in the order of their parts' ids, then of their lengths (SpmConverter in transformers).
    """
    found = []
    for piece, score in pieces.items():
        halves = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
        pairs = [(left, right) for left, right in halves if left in pieces and right in pieces]
        found += [(score, *pair) for pair in sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    found.sort(key=lambda row: (row[0], len(row[1]), len(row[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _model(vocab: Mapping[str, int], merges: Sequence[str], ignore_merges: bool = False) -> BpeModel:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    }


def _pre_tokenizer(read: Metadata) -> PreTokenizer:
    name = read.text("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"{read.path}: tokenizer.ggml.pre {name[:40]!r} is not known, and text would be cut in other places than "
            f"the model learned: expected one of {', '.join(PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[name]


def _adds_bos(read: Metadata) -> bool:
    is_bpe = read.text("tokenizer.ggml.model", "none") == "gpt2"
    return read.flag("tokenizer.ggml.add_bos_token", default=_pre_tokenizer(read).adds_bos if is_bpe else True)


def _adds_eos(read: Metadata) -> bool:
    return read.flag("tokenizer.ggml.add_eos_token", default=False)


def _template(read: Metadata, tokens: Sequence[str]) -> Step | None:
    """The post-processor that puts special tokens around a text; None where there are none."""
    wanted = {"bos": _adds_bos(read), "eos": _adds_eos(read)}
    ids = {name: _special_id(read, name, len(tokens)) for name, wants in wanted.items() if wants}
    around = {name: token_id for name, token_id in ids.items() if token_id is not None}
    if not around:
        return None

    def sequence(letter: str, type_id: int) -> Iterator[Step]:
        if "bos" in around:
            yield {"SpecialToken": {"id": tokens[around["bos"]], "type_id": type_id}}
        yield {"Sequence": {"id": letter, "type_id": type_id}}
        if "eos" in around:
            yield {"SpecialToken": {"id": tokens[around["eos"]], "type_id": type_id}}

    return {
        "type": "TemplateProcessing",
        "single": list(sequence("A", 0)),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {
            tokens[token_id]: {"id": tokens[token_id], "ids": [token_id], "tokens": [tokens[token_id]]}
            for token_id in around.values()
        },
    }


_KINDS: Final[dict[str, Callable[[Metadata, Sequence[str], Sequence[int], Mapping[str, int]], TokenizerSteps]]] = {
    "gpt2": _bpe,
    "llama": _sentencepiece,
}
