"""What stands beside the weights in a checkpoint's folder, read and checked before a weight is: generation_config.json,
tokenizer.json, tokenizer_config.json and special_tokens_map.json and the chat templates.

A key that is absent, or null, is None here. Whatever else is not of its type, or not in its range, is one line with the
file, the key, what was found and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from toolkit import names
from toolkit.errors import CheckpointError
from toolkit.files import is_there, read_json, read_text

GENERATION_FILE: Final = "generation_config.json"
TOKENIZER_CONFIG_FILE: Final = "tokenizer_config.json"
SPECIAL_TOKENS_FILE: Final = "special_tokens_map.json"
TEMPLATE_FILE: Final = "chat_template.jinja"
# Where a checkpoint with several has those that are not the default.
TEMPLATES_FOLDER: Final = "additional_chat_templates"
# What processors of pictures and text are saved with.
PROCESSOR_TEMPLATE_FILE: Final = "chat_template.json"
SPECIAL_TOKENS: Final = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Gemma's tokenizer.json, the largest published one, has 33 MB.
_MAX_BYTES: Final = 256 << 20
_MAX_TEMPLATE_BYTES: Final = 1 << 20
_EXPECTED: Final = "a checkpoint folder in Hugging Face layout has one"


@dataclass(frozen=True)
class Sampling:
    """How the checkpoint's authors want text to be sampled; None where generation_config.json says nothing."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    min_length: int | None = None


@dataclass(frozen=True)
class Generation:
    """generation_config.json: the ids that end an answer, begin a text and pad one, and how to sample."""

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Vocabulary:
    """tokenizer.json's tokens. `added` maps the text of each added token to its id, `ids` holds every id there is."""

    added: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    ids: frozenset[int] = frozenset()

    def id_of(self, token: str) -> int | None:
        """The id of a token by its text; None if the vocabulary has no such token."""
        return self.added.get(token, self.tokens.get(token))


@dataclass(frozen=True)
class SideFiles:
    """What a checkpoint's folder says beside the weights. `vocabulary` is None where there is no tokenizer.json,
    `eos_token` the text of the tokenizer's end-of-text token by the file that names it, `templates` every chat
    template."""

    generation: Generation = Generation()
    vocabulary: Vocabulary | None = None
    eos_token: Mapping[str, str] = field(default_factory=dict)
    templates: tuple[str, ...] = ()


def read_side_files(folder: Path, vocab_size: int) -> SideFiles:
    """Reads what there is; a file that is missing is as one that says nothing.

    Raises CheckpointError for a file that is no JSON object or holds a value that cannot be, ids outside the
    `vocab_size` rows of the embedding among them.
    """
    tokenizer = _object(folder / names.TOKENIZER_FILE)
    config = _object(folder / TOKENIZER_CONFIG_FILE)
    special = _object(folder / SPECIAL_TOKENS_FILE)
    eos = {
        file: text
        for file, raw in ((TOKENIZER_CONFIG_FILE, config), (SPECIAL_TOKENS_FILE, special))
        if (text := _token_text(raw, "eos_token", folder / file))
    }
    _check_settings(folder, config, special)
    return SideFiles(
        generation=_generation(_Values(folder / GENERATION_FILE), vocab_size),
        vocabulary=_vocabulary(tokenizer, folder / names.TOKENIZER_FILE) if tokenizer else None,
        eos_token=eos,
        templates=tuple(_templates(folder, config)),
    )


def side_paths(folder: Path) -> list[Path]:
    """The files of a checkpoint beside its weights that decide what a bundle of it is, those that are there."""
    named = (
        names.CONFIG_FILE,
        GENERATION_FILE,
        names.TOKENIZER_FILE,
        TOKENIZER_CONFIG_FILE,
        SPECIAL_TOKENS_FILE,
        PROCESSOR_TEMPLATE_FILE,
        TEMPLATE_FILE,
    )
    paths = [*(folder / name for name in named), *sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))]
    return [path for path in paths if path.is_file()]


def _check_settings(folder: Path, config: Mapping[str, Any], special: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a setting of the tokenizer that is of another type than programs take it for."""
    for file, raw in ((TOKENIZER_CONFIG_FILE, config), (SPECIAL_TOKENS_FILE, special)):
        for key in SPECIAL_TOKENS:
            _token_text(raw, key, folder / file)
    said = _Values(folder / TOKENIZER_CONFIG_FILE)
    said.text("tokenizer_class")
    for flag in ("add_bos_token", "add_eos_token"):
        said.flag(flag)


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file."""
    return read_json(path, _MAX_BYTES, CheckpointError, _EXPECTED) if is_there(path, CheckpointError) else {}


class _Values:
    """Reads one file's keys as the types they should have; null counts as absent."""

    def __init__(self, path: Path) -> None:
        self._path, self._raw = path, _object(path)

    def number(self, key: str, low: float, high: float = math.inf, *, above: bool = False) -> float | None:
        """A number from `low` (or above it) to `high`."""
        value = self._raw.get(key)
        if value is None:
            return None
        fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
        if not fits or not (low < value if above else low <= value) or not value <= high:
            word = "above" if above else "of at least"
            upto = f" and at most {high:g}" if high < math.inf else ""
            raise CheckpointError(f"{self._path}: {key} is {_short(value)}, expected a number {word} {low:g}{upto}")
        return float(value)

    def count(self, key: str) -> int | None:
        """Returns a whole number of at least 0, None where there is none; raises CheckpointError for anything else."""
        value = self._raw.get(key)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # 50.0, as some programs write every number
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
            raise CheckpointError(f"{self._path}: {key} is {_short(value)}, expected a whole number of at least 0")
        return value

    def text(self, key: str) -> str | None:
        """Returns a text, None where there is none; raises CheckpointError for anything else."""
        value = self._raw.get(key)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{self._path}: {key} is {_short(value)}, expected a text")
        return value

    def flag(self, key: str) -> bool | None:
        """Returns true or false, None where there is neither; raises CheckpointError for anything else."""
        value = self._raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"{self._path}: {key} is {_short(value)}, expected true or false")
        return value

    def ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One id or a list of them, each with a row of the embedding."""
        value = self._raw.get(key)
        given = [] if value is None else value if isinstance(value, list) else [value]
        for one in given:
            if isinstance(one, bool) or not isinstance(one, int):
                raise CheckpointError(f"{self._path}: {key} is {_short(value)}, expected a token id or a list of them")
            if not 0 <= one < vocab_size:
                raise CheckpointError(
                    f"{self._path}: {key} holds {_short(one)}, expected ids below the config's vocab_size {vocab_size}"
                )
        return tuple(given)

    def one_id(self, key: str, vocab_size: int) -> int | None:
        """Returns the first of `ids`, None where there is none."""
        return next(iter(self.ids(key, vocab_size)), None)


def _generation(values: _Values, vocab_size: int) -> Generation:
    return Generation(
        eos_token_ids=values.ids("eos_token_id", vocab_size),
        bos_token_id=values.one_id("bos_token_id", vocab_size),
        pad_token_id=values.one_id("pad_token_id", vocab_size),
        sampling=Sampling(
            do_sample=values.flag("do_sample"),
            temperature=values.number("temperature", 0),
            top_k=values.count("top_k"),
            top_p=values.number("top_p", 0, 1),
            min_p=values.number("min_p", 0, 1),
            repetition_penalty=values.number("repetition_penalty", 0, above=True),
            no_repeat_ngram_size=values.count("no_repeat_ngram_size"),
            min_length=values.count("min_length"),
        ),
    )


def _vocabulary(raw: Mapping[str, Any], path: Path) -> Vocabulary:
    """Every token of tokenizer.json; its model holds them as an object (BPE, WordPiece) or as pairs (Unigram)."""
    model = raw.get("model")
    listed = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(listed, list):
        pairs = all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in listed)
        tokens = {pair[0]: k for k, pair in enumerate(listed)} if pairs else None
    else:
        tokens = listed if isinstance(listed, dict) else None
    if not tokens or not all(_is_id(value) for value in tokens.values()):
        raise CheckpointError(f"{path} holds no vocabulary of tokens with ids: not a tokenizer's file, or damaged")
    added = raw.get("added_tokens")
    added = [] if added is None else added
    whole = isinstance(added, list) and all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and _is_id(token.get("id")) for token in added
    )
    if not whole:
        raise CheckpointError(f"{path}: added_tokens holds an entry without content and id: it is damaged")
    by_text = {str(token["content"]): int(token["id"]) for token in added}
    return Vocabulary(by_text, tokens, frozenset(tokens.values()) | frozenset(by_text.values()))


def _templates(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Every chat template's text: in tokenizer_config.json as one or as a list with names, or in files of their own."""
    value = config.get("chat_template")
    entries = value if isinstance(value, list) else [] if value is None else [{"template": value}]
    for entry in entries:
        text = entry.get("template") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            where = folder / TOKENIZER_CONFIG_FILE
            raise CheckpointError(f"{where}: chat_template is {_short(value)}, expected a text or a list of named ones")
        yield text
    yield from filter(None, [_Values(folder / PROCESSOR_TEMPLATE_FILE).text("chat_template")])
    for path in (folder / TEMPLATE_FILE, *sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))):
        if is_there(path, CheckpointError):
            yield read_text(path, _MAX_TEMPLATE_BYTES, CheckpointError)


def _token_text(raw: Mapping[str, Any], key: str, path: Path) -> str | None:
    """The text of a special token, which stands as a string or as an object with `content`."""
    value = raw.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{path}: {key} is {_short(value)}, expected a token's text")
    return value


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _short(value: object) -> str:
    """A value as a message may carry it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
