"""The tokenizer's files in a bundle: the checkpoint's own, but for what onnxruntime-genai would read otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from toolkit import names
from toolkit.bundle.chat_template import (
    ORIGINAL_FILE,
    additional_special_tokens,
    shipped_template,
    special_tokens,
    tokenizer_config,
)
from toolkit.bundle.manifest import ChangedFile
from toolkit.bundle.reasoning import REASONING_FILE, reasoning
from toolkit.bundle.stop_tokens import StopToken
from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.side_files import GENERATION_FILE, PROCESSOR_TEMPLATE_FILE, TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from toolkit.errors import CheckpointError
from toolkit.evaluate.encodes import checked_tokenizer
from toolkit.evaluate.opens import Words
from toolkit.evaluate.renders import TemplateJob, checked_template
from toolkit.files import write_json, write_text
from toolkit.typed_json import to_json

_COPIED: Final = (names.TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, GENERATION_FILE, TEMPLATE_FILE)


@dataclass(frozen=True)
class TokenizerFiles:
    """The files to write beside the graphs: names to copy, tokenizer_config.json where it is not the checkpoint's own,
    the chat template as it was, and what is changed and why. `words` are what the finished bundle is tried on, None
    where it has none."""

    copied: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None
    template: str = ""
    opens_thought: bool = False
    changed: tuple[ChangedFile, ...] = ()
    words: Words | None = None


def plan_tokenizer(checkpoint: Checkpoint) -> TokenizerFiles:
    """What a bundle of this checkpoint gets; nothing for random weights.

    Raises CheckpointError without tokenizer.json, UnsupportedError for a tokenizer or a chat template that cannot be
    made to work.
    """
    folder = checkpoint.folder
    if checkpoint.synthetic:
        return TokenizerFiles()
    if not (folder / names.TOKENIZER_FILE).is_file():
        raise CheckpointError(f"{folder} has no {names.TOKENIZER_FILE}: {_how_to_get_one(folder)}")
    given = tokenizer_config(folder)
    plain = {key: value for key, value in given.items() if key != "chat_template"} or _made(checkpoint)
    checked = checked_tokenizer(folder / names.TOKENIZER_FILE, plain)
    reasons = list(checked.changes) + [f"encoded otherwise even so: {name}" for name in checked.differs]
    config = checked.config
    if not given:
        reasons.append(f"the checkpoint has no {TOKENIZER_CONFIG_FILE}")
    shipped = shipped_template(folder)
    opens, template = False, ""
    words = Words(str(folder / names.TOKENIZER_FILE), checked.differs)
    if shipped is not None:
        job = TemplateJob(shipped.text, special_tokens(folder), additional_special_tokens(folder))
        made = checked_template(job)
        words = replace(words, template=job, rendered_otherwise=made.differs)
        opens, template = made.opens_thought, shipped.text
        config = {**config, "chat_template": made.text}
        reasons += [f"chat template: {change}" for change in made.changes]
        reasons += [f"chat template, not as in jinja2 even so: {name}" for name in made.differs]
        if shipped.source == PROCESSOR_TEMPLATE_FILE:
            reasons.append(f"the chat template is that of {shipped.source}: the tokenizer has none")
        if shipped.others:
            reasons.append(f"chat templates named {', '.join(shipped.others)} are left out: one is read")
    if "chat_template" in given and "chat_template" not in config:
        reasons.append("a chat template that says nothing is left out")
    copied = tuple(name for name in _COPIED if (folder / name).is_file())
    if config == given:
        changed = (ChangedFile(TOKENIZER_CONFIG_FILE, tuple(reasons)),) if reasons else ()
        return TokenizerFiles(copied, None, template, opens, changed, words)
    if shipped is not None and shipped.source != TOKENIZER_CONFIG_FILE:
        reasons.append(f"{shipped.source} stands where every release of onnxruntime-genai reads it")
    kept = tuple(name for name in copied if name not in (TEMPLATE_FILE, TOKENIZER_CONFIG_FILE))
    return TokenizerFiles(kept, config, template, opens, (ChangedFile(TOKENIZER_CONFIG_FILE, tuple(reasons)),), words)


def _how_to_get_one(folder: Path) -> str:
    """What makes it of the files that are there."""
    sentencepiece, merges = any(folder.glob("*.model")), (folder / "merges.txt").is_file()
    if sentencepiece or merges:
        needed = "transformers and sentencepiece" if sentencepiece else "transformers"
        return (
            f"onnxruntime-genai needs it: with {needed}, "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) makes it"
        )
    if (folder / "tekken.json").is_file():
        return (
            "onnxruntime-genai needs it, and tekken.json is Mistral's own format: take the model in Hugging Face layout"
        )
    return "onnxruntime-genai needs it: take it from the model that this one was made from"


def _made(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Settings for a tokenizer that has none: a class that every release knows, and the config's own tokens."""
    vocabulary, config = checkpoint.side.vocabulary, checkpoint.config
    texts = {} if vocabulary is None else {k: v for v, k in {**vocabulary.tokens, **vocabulary.added}.items()}
    ids = {"bos_token": config.bos_token_id, "eos_token": next(iter(config.eos_token_ids), None)}
    known = {name: texts[number] for name, number in ids.items() if number in texts}
    said = special_tokens(checkpoint.folder)
    return {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, **known, **said}


def write_tokenizer(
    planned: TokenizerFiles, checkpoint: Checkpoint, stop_tokens: tuple[StopToken, ...], bundle: Path
) -> list[str]:
    """Writes the files into the bundle; returns their names."""
    if not planned.copied:
        return []
    for name in planned.copied:
        shutil.copyfile(checkpoint.folder / name, bundle / name)
    written = [*planned.copied, REASONING_FILE]
    if planned.config is not None:
        write_json(bundle / TOKENIZER_CONFIG_FILE, planned.config)
        written.append(TOKENIZER_CONFIG_FILE)
        if planned.template not in ("", planned.config.get("chat_template")):
            write_text(bundle / ORIGINAL_FILE, planned.template)
            written.append(ORIGINAL_FILE)
    said = reasoning(checkpoint.side, planned.template, planned.opens_thought, stop_tokens)
    write_json(bundle / REASONING_FILE, to_json(said))
    return written
