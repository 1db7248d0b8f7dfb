"""The tokenizer's files in a bundle: the checkpoint's own, but for what onnxruntime-genai would read otherwise."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.bundle.chat_template import ORIGINAL_FILE, shipped_template, special_tokens, tokenizer_config
from toolkit.bundle.manifest import ChangedFile
from toolkit.bundle.reasoning import REASONING_FILE, reasoning
from toolkit.bundle.stop_tokens import StopToken
from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.side_files import GENERATION_FILE, TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from toolkit.errors import CheckpointError
from toolkit.evaluate.opens import CheckedTemplate, checked_template
from toolkit.files import write_json, write_text
from toolkit.typed_json import to_json

_COPIED: Final = (names.TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, GENERATION_FILE, TEMPLATE_FILE)


@dataclass(frozen=True)
class TokenizerFiles:
    """The files to write beside the graphs: names to copy, the template as it goes into tokenizer_config.json, and what
    is changed and why. `template` is None where the checkpoint has none, or its own is right as it stands."""

    copied: tuple[str, ...] = ()
    template: CheckedTemplate | None = None
    original: str = ""
    opens_thought: bool = False
    changed: tuple[ChangedFile, ...] = ()


def plan_tokenizer(checkpoint: Checkpoint) -> TokenizerFiles:
    """What a bundle of this checkpoint gets; nothing for random weights.

    Raises CheckpointError without tokenizer.json, UnsupportedError for a chat template that cannot be made to work.
    """
    folder = checkpoint.folder
    if checkpoint.synthetic:
        return TokenizerFiles()
    if not (folder / names.TOKENIZER_FILE).is_file():
        raise CheckpointError(f"{folder} has no {names.TOKENIZER_FILE}: onnxruntime-genai needs it")
    copied = TokenizerFiles(tuple(name for name in _COPIED if (folder / name).is_file()))
    shipped = shipped_template(folder)
    if shipped is None:
        return copied
    checked = checked_template(shipped.text, special_tokens(folder))
    given = tokenizer_config(folder).get("chat_template")
    reasons = list(checked.changes)
    if shipped.others:
        reasons.append(f"templates named {', '.join(shipped.others)} are left out: one is read")
    if given != shipped.text:
        reasons.append(f"{shipped.source} stands where every release of onnxruntime-genai reads it")
    reasons += [f"not as in jinja2: {name}" for name in checked.differs]
    if not reasons:
        return replace(copied, original=shipped.text, opens_thought=checked.opens_thought)
    names_left = tuple(name for name in copied.copied if name != TEMPLATE_FILE)
    changed = ChangedFile(TOKENIZER_CONFIG_FILE, f"chat_template of {shipped.source}", tuple(reasons))
    return TokenizerFiles(names_left, checked, shipped.text, checked.opens_thought, (changed,))


def write_tokenizer(
    planned: TokenizerFiles, checkpoint: Checkpoint, stop_tokens: tuple[StopToken, ...], bundle: Path
) -> list[str]:
    """Writes the files into the bundle; returns their names."""
    if not planned.copied:
        return []
    for name in planned.copied:
        shutil.copyfile(checkpoint.folder / name, bundle / name)
    written = [*planned.copied, REASONING_FILE]
    if planned.template is not None:
        config = {**tokenizer_config(checkpoint.folder), "chat_template": planned.template.text}
        write_json(bundle / TOKENIZER_CONFIG_FILE, config)
        write_text(bundle / ORIGINAL_FILE, planned.original)
        written += [name for name in (TOKENIZER_CONFIG_FILE, ORIGINAL_FILE) if name not in written]
    said = reasoning(checkpoint.side, planned.original, planned.opens_thought, stop_tokens)
    write_json(bundle / REASONING_FILE, to_json(said))
    return written
