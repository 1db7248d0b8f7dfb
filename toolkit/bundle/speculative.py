"""`speculation.json`: what onnxruntime-genai is told, beside genai_config.json, so that it guesses tokens ahead.

Releases before 0.16 refuse a genai_config.json with these keys, so they stand in a file of their own, which is laid
over it: `config = og.Config(folder); config.overlay(text)`. Who does not know the file decodes a token a run as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.bundle.settings import DecoderSettings, read_genai_config
from toolkit.errors import BundleError
from toolkit.files import read_json
from toolkit.graph.interface import GraphInterface, read_interface
from toolkit.speculation import DRAFT, NGRAM, SPECULATIONS
from toolkit.typed_json import JsonObject, from_json

SPECULATION_FILE: Final = "speculation.json"
_MAX_BYTES: Final = 1 << 20


def speculation_settings(word: str, draft: Mapping[str, object] | None = None) -> JsonObject:
    """The file's object for a row of SPECULATIONS; `draft` is `model.decoder` of the draft's own genai_config.json."""
    told: JsonObject = {"speculative": dict(SPECULATIONS[word])}
    return {"model": {"draft": dict(draft)}, **told} if draft else told


def draft_decoder(bundle: Path) -> JsonObject:
    """`model.decoder` of a draft's bundle, its graph under the name that it has beside the model's."""
    decoder: JsonObject = read_genai_config(bundle)["model"]["decoder"]
    return {**decoder, "filename": names.draft_file(decoder["filename"])}


def read_speculation(bundle: Path, on_cpu: bool = False) -> JsonObject | None:
    """A bundle's object, None where it has none; `on_cpu` asks for no provider. Raises BundleError for a file that is
    not as an export writes it."""
    path = bundle / SPECULATION_FILE
    if not path.is_file():
        return None
    raw = read_json(path, _MAX_BYTES, BundleError, "an export writes one")
    draft = raw.get("model", {}).get("draft") if isinstance(raw.get("model", {}), dict) else raw
    if not isinstance(raw.get("speculative"), dict) or not isinstance(draft, dict | None):
        raise BundleError(f"{path} has no `speculative`, or a `model.draft` that is no object: export it again")
    if draft is not None:
        file = _graph(path, draft)
        if not (bundle / file).is_file():
            raise BundleError(f"{path} names {file}, which is no file of the bundle: export it again")
        if on_cpu and "session_options" in draft:
            draft["session_options"] = {**draft["session_options"], "provider_options": []}
    return raw


def speculation_of(settings: JsonObject | None) -> str | None:
    """The word in SPECULATIONS that settings stand for; None where nothing guesses."""
    if settings is None:
        return None
    return DRAFT if settings.get("model", {}).get("draft") else NGRAM


def draft_graph(settings: JsonObject | None) -> str | None:
    """The file of the draft's graph; None where there is no draft."""
    draft = (settings or {}).get("model", {}).get("draft")
    return str(draft["filename"]) if draft else None


def lint_speculation(bundle: Path, graph: GraphInterface) -> list[str]:
    """One line for what is in the file that onnxruntime-genai would refuse beside the model's graph; none without the
    file."""
    try:
        settings = read_speculation(bundle)
    except BundleError as problem:
        return [str(problem)]
    if settings is None:
        return []
    logits, draft = graph.outputs.get(names.LOGITS), draft_graph(settings)
    if logits is None or len(logits.shape) < 2:
        return []
    if logits.shape[1] == 1:
        return [f"{SPECULATION_FILE} guesses tokens, and the graph gives logits of the last position alone"]
    own = read_interface(bundle / draft).outputs.get(names.LOGITS) if draft else logits
    if own is None or own.shape[-1:] != logits.shape[-1:]:
        return [f"{draft} has logits of {own.shape[-1] if own else 'nothing'}, the model's have {logits.shape[-1]}"]
    return []


def _graph(path: Path, draft: JsonObject) -> str:
    try:
        file = from_json(DecoderSettings, draft, "model.draft").filename
    except ValueError as problem:
        raise BundleError(f"{path}: {problem}: export it again") from None
    if not file or Path(file).name != file:
        raise BundleError(f"{path} names {file!r:.60} as the draft's graph, expected a file of the bundle")
    return file
