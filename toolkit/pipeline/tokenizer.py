"""The tokenizer's files in a bundle: the checkpoint's own, but for what onnxruntime-genai would read otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from toolkit import names
from toolkit.bundle.chat_template import (
    ORIGINAL_FILE,
    ShippedTemplate,
    additional_special_tokens,
    shipped_template,
    special_tokens,
    token_text,
    tokenizer_config,
)
from toolkit.bundle.manifest import ChangedFile
from toolkit.bundle.reasoning import REASONING_FILE, reasoning
from toolkit.bundle.stop_tokens import StopToken
from toolkit.bundle.tokenizer_rewrite import with_known_splits, with_tokens
from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.side_files import (
    GENERATION_FILE,
    PROCESSOR_TEMPLATE_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
)
from toolkit.errors import CheckpointError
from toolkit.evaluate.encodes import checked_tokenizer
from toolkit.evaluate.opens import Words
from toolkit.evaluate.renders import KNOWN_TOKENS, CheckedTemplate, TemplateJob, checked_template
from toolkit.files import write_json, write_text
from toolkit.typed_json import to_json

_COPIED: Final = (names.TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, GENERATION_FILE, TEMPLATE_FILE)


@dataclass(frozen=True)
class TokenizerFiles:
    """The files to write beside the graphs: names to copy, tokenizer_config.json where it is not the checkpoint's own,
    the chat template as it was, and what is changed and why. tokenizer.json gets the `added` tokens, and splits that
    are known if `known_splits`. `after_answer` is what the template writes behind an answer. `words` are what the
    finished bundle is tried on, None where it has none."""

    copied: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None
    template: str = ""
    opens_thought: bool = False
    changed: tuple[ChangedFile, ...] = ()
    words: Words | None = None
    after_answer: str = ""
    added: Mapping[str, int] = field(default_factory=dict)
    known_splits: bool = False


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
    plain, reasons = _settings(checkpoint, given)
    added = checkpoint.side.vocabulary.elsewhere if checkpoint.side.vocabulary else {}
    shipped = shipped_template(folder)
    job = shipped and TemplateJob(shipped.text, special_tokens(folder), additional_special_tokens(folder))
    # Each is tried in a child of its own, which takes seconds.
    with ThreadPoolExecutor(1) as beside:
        trying = job and beside.submit(checked_template, job)
        checked = checked_tokenizer(folder / names.TOKENIZER_FILE, plain, added)
    reasons += [*checked.changes, *(f"encoded otherwise even so: {name}" for name in checked.differs)]
    made = TokenizerFiles(
        copied=tuple(name for name in _COPIED if (folder / name).is_file()),
        config=checked.config,
        words=Words("" if added else str(folder / names.TOKENIZER_FILE), checked.differs),
        added=added,
        known_splits=bool(checked.splits),
    )
    if shipped and job and trying:
        made, said = _with_template(made, shipped, job, trying.result())
        reasons += said
    elif "chat_template" in given:
        reasons.append("a chat template that says nothing is left out")
    listed = f"{', '.join(added)[:200]} of other files of the checkpoint, which it lacked"
    rewriting = ([f"tokens are added: {listed}"] if added else []) + [*checked.splits]
    changed = [(TOKENIZER_CONFIG_FILE, reasons), (names.TOKENIZER_FILE, rewriting)]
    made = replace(made, changed=tuple(ChangedFile(name, tuple(why)) for name, why in changed if why))
    if made.config == given:
        return replace(made, config=None)
    return replace(made, copied=tuple(n for n in made.copied if n not in (TEMPLATE_FILE, TOKENIZER_CONFIG_FILE)))


def _settings(checkpoint: Checkpoint, given: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """tokenizer_config.json to begin with, without a chat template, and what is otherwise in it than in the given one:
    the tokens that onnxruntime-genai hands to templates are those that transformers does."""
    plain = {key: value for key, value in given.items() if key != "chat_template"}
    if not plain:
        return _made(checkpoint), [] if given else [f"the checkpoint has no {TOKENIZER_CONFIG_FILE}"]
    reasons = []
    said = special_tokens(checkpoint.folder)
    for name in KNOWN_TOKENS:
        if name in said and said[name] != token_text(plain.get(name)):
            plain[name] = said[name]
            reasons.append(f"{name} is that of {SPECIAL_TOKENS_FILE}")
    return plain, reasons


def _with_template(
    made: TokenizerFiles, shipped: ShippedTemplate, job: TemplateJob, checked: CheckedTemplate
) -> tuple[TokenizerFiles, list[str]]:
    """The files with a chat template in tokenizer_config.json, and what is otherwise in it."""
    reasons = [f"chat template: {change}" for change in checked.changes]
    reasons += [f"chat template, not as in jinja2 even so: {name}" for name in checked.differs]
    if shipped.source == PROCESSOR_TEMPLATE_FILE:
        reasons.append(f"the chat template is that of {shipped.source}: the tokenizer has none")
    if shipped.others:
        reasons.append(f"chat templates named {', '.join(shipped.others)} are left out: one is read")
    if shipped.source != TOKENIZER_CONFIG_FILE:
        reasons.append(f"{shipped.source} stands where every release of onnxruntime-genai reads it")
    words = made.words and replace(made.words, template=job, rendered_otherwise=checked.differs)
    config = {**(made.config or {}), "chat_template": checked.text}
    thought, after = checked.opens_thought, checked.after_answer
    return (
        replace(made, config=config, template=shipped.text, opens_thought=thought, words=words, after_answer=after),
        reasons,
    )


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
    if planned.words is None:
        return []
    for name in planned.copied:
        shutil.copyfile(checkpoint.folder / name, bundle / name)
    if planned.added or planned.known_splits:
        raw = json.loads((checkpoint.folder / names.TOKENIZER_FILE).read_text(encoding="utf-8"))
        raw = with_tokens(raw, planned.added) if planned.added else raw
        write_json(bundle / names.TOKENIZER_FILE, with_known_splits(raw)[0] if planned.known_splits else raw)
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
