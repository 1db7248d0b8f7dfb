"""A bundle that was just made, opened by onnxruntime-genai as an app would: model, tokenizer, chat template.

Runs in a process of its own, since native code may crash, and on the CPU, whatever the bundle is made for. Kernels that
would pack the weights into memory of their own are told not to, so that opening maps files: it costs a tenth of a
second and no memory to speak of, whatever the size.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from toolkit.apart import ChildFailed, answer, run_apart
from toolkit.bundle.settings import Settings, read_settings
from toolkit.bundle.stage_files import uncompiled_settings
from toolkit.errors import BundleError, MachineError
from toolkit.evaluate.encodes import encoded_otherwise
from toolkit.evaluate.linked import linked_copy
from toolkit.evaluate.renders import NOT_TRIED, TemplateJob, rendered_otherwise
from toolkit.machine import peak_rss_bytes
from toolkit.names import TOKENIZER_FILE
from toolkit.report.sections import NotMeasured, Opened
from toolkit.typed_json import Json, from_json, to_json

_SECONDS: Final = 600
_RUNTIME: Final = "onnxruntime-genai"
_MAPPED: Final = {"session.disable_prepacking": "1"}


@dataclass(frozen=True)
class Words:
    """What the tokenizer and the chat template of a bundle have to do: encode as `tokenizer_file`, the checkpoint's,
    does, or the bundle's own if that is empty, and render as `template` does, but for what was found to come out
    otherwise when they were planned."""

    tokenizer_file: str
    encoded_otherwise: tuple[str, ...] = ()
    template: TemplateJob | None = None
    rendered_otherwise: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Job:
    bundle: str
    words: Words | None = None


def open_apart(bundle: Path, words: Words | None) -> Opened | NotMeasured:
    """Opens the bundle in a process of its own; without `words`, as random weights are, its model alone.

    Returns what it took, or why it was not tried. Raises BundleError if onnxruntime-genai does not open it, or reads it
    otherwise than was planned.
    """
    try:
        made = run_apart("toolkit.evaluate.opens", to_json(_Job(str(bundle), words)), timeout_s=_SECONDS)
    except ChildFailed as failure:
        raise BundleError(
            f"onnxruntime-genai does not open the bundle that was made in {bundle}: {failure.reason}"
        ) from None
    if "not_tried" in made:
        return NotMeasured("conversion.opened", made["not_tried"])
    return from_json(Opened, made, "the opened bundle")


def _open(raw: Json) -> object:
    """In the child."""
    job = from_json(_Job, raw, "the job")
    try:
        import onnxruntime_genai as og
    except ImportError:
        return {"not_tried": f"{_RUNTIME} is not installed: pip install {_RUNTIME}"}
    bundle = Path(job.bundle)
    start = time.perf_counter()
    try:
        model, _folder = _mapped_model(og, bundle)
    except MachineError as problem:
        return {"not_tried": str(problem)}
    seconds = time.perf_counter() - start
    if job.words:
        own = str(bundle / TOKENIZER_FILE)
        _check_words(og.Tokenizer(model), replace(job.words, tokenizer_file=job.words.tokenizer_file or own))
    runtime = f"{_RUNTIME} {importlib.metadata.version(_RUNTIME)}"
    return to_json(Opened(runtime, seconds, peak_rss_bytes()))


def _mapped_model(og: Any, bundle: Path) -> tuple[Any, tempfile.TemporaryDirectory[str] | None]:
    """The model with its weights mapped; and the folder with settings for the CPU, which it needs while it is open."""
    settings = read_settings(bundle)
    if not settings.providers():
        config = og.Config(str(bundle))
        config.overlay(json.dumps({"model": {"decoder": _told(settings)}}))
        return og.Model(config), None
    folder = linked_copy(bundle, uncompiled_settings(settings).on_cpu(_MAPPED), within=bundle)
    return og.Model(folder.name), folder


def _told(settings: Settings) -> Json:
    """What is said of the decoder beside its settings."""
    told = {"session_options": _MAPPED}
    return {"pipeline": [{stage.name: told for stage in settings.stages}]} if settings.is_pipeline else told


def _check_words(tokenizer: Any, words: Words) -> None:
    """Raises BundleError for a text or a conversation that comes out otherwise than was planned."""
    if not any(name.startswith(NOT_TRIED) for name in words.encoded_otherwise):
        found = encoded_otherwise(tokenizer, Path(words.tokenizer_file))
        _refuse(found, words.encoded_otherwise, "encodes")
    if words.template and not any(name.startswith(NOT_TRIED) for name in words.rendered_otherwise):
        _refuse(rendered_otherwise(tokenizer, words.template), words.rendered_otherwise, "renders")


def _refuse(found: list[str], known: tuple[str, ...], does: str) -> None:
    if others := [name for name in found if name not in known]:
        raise BundleError(f"it {does} {', '.join(others)} otherwise than the checkpoint's own files say")


if __name__ == "__main__":
    answer(_open)
