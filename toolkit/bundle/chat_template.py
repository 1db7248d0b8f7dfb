"""The chat template a checkpoint ships, from any of the places it may stand in, and the special tokens it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from toolkit.checkpoint.side_files import (
    DEFAULT_TEMPLATE,
    PROCESSOR_TEMPLATE_FILE,
    SPECIAL_TOKENS,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    TEMPLATES_FOLDER,
    TOKENIZER_CONFIG_FILE,
    named_templates,
)
from toolkit.errors import CheckpointError
from toolkit.files import read_json, read_text

ORIGINAL_FILE: Final = "chat_template.original.jinja"
_MAX_BYTES: Final = 64 << 20
_MAX_TEMPLATE_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class ShippedTemplate:
    """A checkpoint's chat template as transformers would take it: its text, the file that it is in, and the names of
    others that stand beside it, such as `tool_use`."""

    text: str
    source: str
    others: tuple[str, ...] = ()


def shipped_template(folder: Path) -> ShippedTemplate | None:
    """The template for plain conversations; None where there is none, or an empty one.

    A file of its own counts before tokenizer_config.json, and a processor's chat_template.json last. Raises
    CheckpointError for one that is no text, or several without a default.
    """
    named = named_templates(tokenizer_config(folder), folder / TOKENIZER_CONFIG_FILE)
    sources = dict.fromkeys(named, TOKENIZER_CONFIG_FILE)
    files = {DEFAULT_TEMPLATE: folder / TEMPLATE_FILE}
    files |= {path.stem: path for path in sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))}
    for name, path in files.items():
        if path.is_file():
            text = read_text(path, _MAX_TEMPLATE_BYTES, CheckpointError)
            if not text.strip():
                continue
            named[name] = text
            sources[name] = path.relative_to(folder).as_posix()
    beside = folder / PROCESSOR_TEMPLATE_FILE
    if not named and beside.is_file():
        named = named_templates(read_json(beside, _MAX_BYTES, CheckpointError, "a checkpoint may have one"), beside)
        sources = dict.fromkeys(named, PROCESSOR_TEMPLATE_FILE)
    if not named:
        return None
    if DEFAULT_TEMPLATE not in named:
        raise CheckpointError(
            f"{folder} has chat templates named {', '.join(sorted(named))} and none named {DEFAULT_TEMPLATE}: put the "
            f"one to use into {TEMPLATE_FILE}"
        )
    others = tuple(sorted(set(named) - {DEFAULT_TEMPLATE}))
    return ShippedTemplate(named[DEFAULT_TEMPLATE], sources[DEFAULT_TEMPLATE], others)


def special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that transformers passes to a template, by their names, those the checkpoint has: the usual
    ones, and those that tokenizer_config.json names by itself under `extra_special_tokens`."""
    given = _special_settings(folder)
    named = given.get("extra_special_tokens")
    texts = {name: token_text(given.get(name)) for name in SPECIAL_TOKENS}
    texts |= {name: token_text(token) for name, token in named.items()} if isinstance(named, dict) else {}
    return {name: text for name, text in texts.items() if text}


def additional_special_tokens(folder: Path) -> tuple[str, ...]:
    """The special tokens without a name of their own, which transformers passes to a template as one list."""
    given = _special_settings(folder)
    listed = given.get("additional_special_tokens") or given.get("extra_special_tokens")
    texts = (token_text(token) for token in listed) if isinstance(listed, list) else ()
    return tuple(text for text in texts if text)


def _special_settings(folder: Path) -> Mapping[str, Any]:
    """Where special tokens stand, as transformers reads it: special_tokens_map.json counts before
    tokenizer_config.json, unless that lists the added tokens itself, as newer ones do."""
    config, path = tokenizer_config(folder), folder / SPECIAL_TOKENS_FILE
    if "added_tokens_decoder" in config or not path.is_file():
        return config
    beside = read_json(path, _MAX_BYTES, CheckpointError, "a checkpoint has one")
    return {**config, **{key: value for key, value in beside.items() if value is not None}}


def tokenizer_config(folder: Path) -> Mapping[str, Any]:
    """tokenizer_config.json; empty where the checkpoint has none."""
    path = folder / TOKENIZER_CONFIG_FILE
    return read_json(path, _MAX_BYTES, CheckpointError, "a checkpoint has one") if path.is_file() else {}


def token_text(token: object) -> str | None:
    """The text of a special token, which stands as it is or in an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
