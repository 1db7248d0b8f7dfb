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
from toolkit.checkpoint.fields import NO_TOKEN, whole
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
ADDED_TOKENS_FILE: Final = "added_tokens.json"
DEFAULT_TEMPLATE: Final = "default"
# Keys of generation_config.json that change what is written and have no setting in onnxruntime-genai, or none that a
# bundle uses, with the value of each that changes nothing.
_NOT_CARRIED: Final = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": 0.0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "sequence_bias": None,
    "stop_strings": None,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
}
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
    """tokenizer.json's tokens. `added` maps the text of each added token to its id, `ids` holds every id there is.
    `elsewhere` are those of `added` that tokenizer.json lacks, and another file names."""

    added: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    ids: frozenset[int] = frozenset()
    elsewhere: Mapping[str, int] = field(default_factory=dict)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its text; None if the vocabulary has no such token."""
        return self.added.get(token, self.tokens.get(token))


@dataclass(frozen=True)
class SideFiles:
    """What a checkpoint's folder says beside the weights. `vocabulary` is None where there is no tokenizer.json,
    `eos_token` the text of the tokenizer's end-of-text token by the file that names it, `templates` every chat
    template, and `not_carried` the keys of generation_config.json that no setting of a bundle stands for."""

    generation: Generation = Generation()
    vocabulary: Vocabulary | None = None
    eos_token: Mapping[str, str] = field(default_factory=dict)
    templates: tuple[str, ...] = ()
    not_carried: tuple[str, ...] = ()


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
    vocabulary = _vocabulary(tokenizer, folder / names.TOKENIZER_FILE) if tokenizer else None
    generation = _Values(folder / GENERATION_FILE)
    return SideFiles(
        generation=_generation(generation, vocab_size),
        vocabulary=vocabulary and _with_tokens_elsewhere(vocabulary, _tokens_elsewhere(folder, config)),
        eos_token=eos,
        templates=tuple(_templates(folder, config)),
        not_carried=tuple(generation.set_keys(_NOT_CARRIED)),
    )


def side_files_of(folder: Path) -> list[Path]:
    """The files of a folder that may stand beside its weights and decide what a bundle of it is, but for templates with
    names of their own."""
    named = (
        names.CONFIG_FILE,
        GENERATION_FILE,
        names.TOKENIZER_FILE,
        TOKENIZER_CONFIG_FILE,
        SPECIAL_TOKENS_FILE,
        ADDED_TOKENS_FILE,
        PROCESSOR_TEMPLATE_FILE,
        TEMPLATE_FILE,
    )
    return [folder / name for name in named]


def side_paths(folder: Path) -> list[Path]:
    """The files of a checkpoint beside its weights that decide what a bundle of it is, those that are there."""
    paths = [*side_files_of(folder), *sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))]
    return [path for path in paths if path.is_file()]


def _check_settings(folder: Path, config: Mapping[str, Any], special: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a setting of the tokenizer that is of another type than programs take it for."""
    for file, raw in ((TOKENIZER_CONFIG_FILE, config), (SPECIAL_TOKENS_FILE, special)):
        for key in SPECIAL_TOKENS:
            _token_text(raw, key, folder / file)
        for key in ("additional_special_tokens", "extra_special_tokens"):
            _check_listed(raw, key, folder / file)
    for key, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{folder / TOKENIZER_CONFIG_FILE}: {key} is {value}, which is no number of JSON's")
    said = _Values(folder / TOKENIZER_CONFIG_FILE)
    said.text("tokenizer_class")
    for flag in ("add_bos_token", "add_eos_token"):
        said.flag(flag)


def _check_listed(raw: Mapping[str, Any], key: str, path: Path) -> None:
    """Raises CheckpointError for special tokens that are neither a list of texts nor, by names, an object of them."""
    value = raw.get(key)
    if value is not None and not isinstance(value, list | dict):
        raise CheckpointError(f"{path}: {key} is {_short(value)}, expected a list of tokens' texts")


def _tokens_elsewhere(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """The added tokens that added_tokens.json and tokenizer_config.json list, with their ids.

    Raises CheckpointError for an entry that is none.
    """
    path, listed = folder / ADDED_TOKENS_FILE, config.get("added_tokens_decoder")
    found = _object(path)
    if not all(_is_id(number) for number in found.values()):
        raise CheckpointError(f"{path} holds an entry that is no token with an id: it is damaged")
    if listed is not None and not isinstance(listed, dict):
        where = folder / TOKENIZER_CONFIG_FILE
        raise CheckpointError(f"{where}: added_tokens_decoder is {_short(listed)}, expected an object of ids")
    for number, token in (listed or {}).items():
        text = token.get("content") if isinstance(token, dict) else None
        if not isinstance(text, str) or not number.isdecimal() or not _is_id(int(number[:12])):
            where = folder / TOKENIZER_CONFIG_FILE
            raise CheckpointError(
                f"{where}: added_tokens_decoder has {number!r:.40}: {_short(token)}, expected ids and tokens' contents"
            )
        found[text] = int(number)
    return found


def _with_tokens_elsewhere(vocabulary: Vocabulary, listed: Mapping[str, int]) -> Vocabulary:
    """The vocabulary with the listed tokens that it lacks, as transformers adds them: those whose ids come next."""
    more: dict[str, int] = {}
    for text, number in sorted(listed.items(), key=lambda entry: entry[1]):
        if vocabulary.id_of(text) is None and number == max(vocabulary.ids) + len(more) + 1:
            more[text] = number
    if not more:
        return vocabulary
    return Vocabulary({**vocabulary.added, **more}, vocabulary.tokens, vocabulary.ids | set(more.values()), more)


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
        value = whole(self._raw.get(key))
        if value is None:
            return None
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
        given = [whole(one) for one in ([] if value is None else value if isinstance(value, list) else [value])]
        ids: list[int] = []
        for one in given:
            if isinstance(one, bool) or not isinstance(one, int):
                raise CheckpointError(f"{self._path}: {key} is {_short(value)}, expected a token id or a list of them")
            if not 0 <= one < vocab_size:
                raise CheckpointError(
                    f"{self._path}: {key} holds {_short(one)}, expected ids below the config's vocab_size {vocab_size}"
                )
            ids.append(one)
        return tuple(ids)

    def one_id(self, key: str, vocab_size: int) -> int | None:
        """Returns the first of `ids`, None where there is none, or -1, which older files say for it."""
        return None if self._raw.get(key) == NO_TOKEN else next(iter(self.ids(key, vocab_size)), None)

    def off_or_count(self, key: str) -> int | None:
        """Returns a `count`, 0 for -1, which other runtimes take for "off"."""
        return 0 if whole(self._raw.get(key)) == -1 else self.count(key)

    def set_keys(self, keys: Mapping[str, object]) -> list[str]:
        """Returns those of the keys that are there, not null, and of another value than given, which does nothing."""
        return [key for key, idle in keys.items() if self._raw.get(key) not in (None, idle, [], {})]


def _generation(values: _Values, vocab_size: int) -> Generation:
    return Generation(
        eos_token_ids=values.ids("eos_token_id", vocab_size),
        bos_token_id=values.one_id("bos_token_id", vocab_size),
        pad_token_id=values.one_id("pad_token_id", vocab_size),
        sampling=Sampling(
            do_sample=values.flag("do_sample"),
            temperature=values.number("temperature", 0),
            top_k=values.off_or_count("top_k"),
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
    """Every chat template's text: in tokenizer_config.json, or in files of their own."""
    yield from named_templates(config, folder / TOKENIZER_CONFIG_FILE).values()
    beside = folder / PROCESSOR_TEMPLATE_FILE
    yield from named_templates(_object(beside), beside).values()
    for path in (folder / TEMPLATE_FILE, *sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))):
        if is_there(path, CheckpointError):
            yield read_text(path, _MAX_TEMPLATE_BYTES, CheckpointError)


def named_templates(config: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The chat templates in a file by their names: one text, a list of named ones, or an object of them. Those that say
    nothing are left out. Raises CheckpointError for anything else."""
    value = config.get("chat_template")
    entries: list[tuple[object, object]]
    if isinstance(value, list):
        entries = [(e.get("name"), e.get("template")) if isinstance(e, dict) else (None, None) for e in value]
    else:
        named = value if isinstance(value, dict) else {} if value is None else {DEFAULT_TEMPLATE: value}
        entries = [*named.items()]
    found: dict[str, str] = {}
    for name, text in entries:
        if not isinstance(name, str) or not isinstance(text, str):
            raise CheckpointError(f"{path}: chat_template is {_short(value)}, expected a text or a list of named ones")
        found[name] = text
    return {name: text for name, text in found.items() if text.strip()}


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
