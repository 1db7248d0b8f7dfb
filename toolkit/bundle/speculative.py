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
from toolkit.speculation import MTP, NGRAM, SPECULATIONS, WITH_GRAPH
from toolkit.typed_json import JsonObject, from_json

SPECULATION_FILE: Final = "speculation.json"
_MAX_BYTES: Final = 1 << 20
# What onnxruntime-genai is told of an MTP head, by its own names in `model.decoder` and `model.mtp` alike.
_OF_A_HEAD: Final = ("filename", "num_hidden_layers", "num_key_value_heads", "head_size", "inputs", "outputs")


def speculation_settings(word: str, draft: Mapping[str, object] | None = None) -> JsonObject:
    """The file's object for a row of SPECULATIONS; `draft` is what `draft_decoder` or `mtp_decoder` returns."""
    told: JsonObject = {"speculative": dict(SPECULATIONS[word])}
    if draft is None:
        return told
    given = {"decoder": {"outputs": {names.HIDDEN_STATES: names.HIDDEN_STATES}}} if word == MTP else {}
    return {"model": {**given, word: dict(draft)}, **told}


def draft_decoder(bundle: Path) -> JsonObject:
    """`model.decoder` of a draft's bundle, its graph under the name that it has beside the model's."""
    decoder: JsonObject = read_genai_config(bundle)["model"]["decoder"]
    return {**decoder, "filename": names.draft_file(decoder["filename"])}


def mtp_decoder(bundle: Path) -> JsonObject:
    """`model.mtp` of an MTP head's bundle, its graph under the name that it has beside the model's."""
    decoder = draft_decoder(bundle)
    return {"main_hidden_states": names.HIDDEN_STATES, **{key: decoder[key] for key in _OF_A_HEAD}}


def head_settings(settings: JsonObject | None) -> JsonObject | None:
    """What is laid over genai_config.json to open the MTP head in place of the model; None without a head."""
    head = (settings or {}).get("model", {}).get(MTP)
    return {"model": {"decoder": {key: head[key] for key in _OF_A_HEAD}}} if head else None


def read_speculation(bundle: Path, on_cpu: bool = False) -> JsonObject | None:
    """A bundle's object, None where it has none; `on_cpu` asks for no provider. Raises BundleError for a file that is
    not as an export writes it."""
    path = bundle / SPECULATION_FILE
    if not path.is_file():
        return None
    raw = read_json(path, _MAX_BYTES, BundleError, "an export writes one")
    model = raw.get("model", {})
    told = [word for word in WITH_GRAPH if isinstance(model, dict) and word in model]
    draft = model[told[0]] if told else None
    whole = isinstance(raw.get("speculative"), dict) and isinstance(model, dict) and len(told) < 2
    if not whole or not isinstance(draft, dict | None):
        raise BundleError(f"{path} has no `speculative`, or a `model.draft` that is no object: export it again")
    if draft is not None:
        file = _graph(path, draft)
        if told == [MTP] and (missing := [key for key in _OF_A_HEAD if key not in draft]):
            raise BundleError(f"{path} has no `model.mtp.{missing[0]}`: export it again")
        if not (bundle / file).is_file():
            raise BundleError(f"{path} names {file}, which is no file of the bundle: export it again")
        if on_cpu and "session_options" in draft:
            draft["session_options"] = {**draft["session_options"], "provider_options": []}
    return raw


def speculation_of(settings: JsonObject | None) -> str | None:
    """The word in SPECULATIONS that settings stand for; None where nothing guesses."""
    if settings is None:
        return None
    return next((word for word in WITH_GRAPH if settings.get("model", {}).get(word)), NGRAM)


def draft_graph(settings: JsonObject | None) -> str | None:
    """The file of the draft's graph, or the MTP head's; None where neither guesses."""
    model = (settings or {}).get("model", {})
    return next((str(model[word]["filename"]) for word in WITH_GRAPH if model.get(word)), None)


def further_outputs(bundle: Path) -> frozenset[str]:
    """The model's outputs that this file names and genai_config.json does not."""
    try:
        settings = read_speculation(bundle)
    except BundleError:
        return frozenset()
    return frozenset([names.HIDDEN_STATES]) if head_settings(settings) else frozenset()


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
    return _lint_head(settings, graph, read_interface(bundle / draft)) if draft and head_settings(settings) else []


def _lint_head(settings: JsonObject, graph: GraphInterface, head: GraphInterface) -> list[str]:
    """One line where the model does not give what its MTP head takes, in its dtype and width, or logits that
    onnxruntime-genai does not read."""
    named = str(settings["model"][MTP].get("main_hidden_states", names.HIDDEN_STATES))
    made, taken = graph.outputs.get(named), head.inputs.get(names.HIDDEN_STATES)
    if made is None or taken is None or (made.dtype, made.shape[-1:]) != (taken.dtype, taken.shape[-1:]):
        said = [f"{value.dtype} {list(value.shape)}" if value else "nothing" for value in (made, taken)]
        return [f"the MTP head takes {names.HIDDEN_STATES} of {said[1]}, the model's {named} are {said[0]}"]
    if (dtype := graph.outputs[names.LOGITS].dtype) != "FLOAT16":
        return [f"the MTP head guesses, and the model's logits are {dtype}: MtpGenerator reads FLOAT16"]
    return []


def _graph(path: Path, draft: JsonObject) -> str:
    try:
        file = from_json(DecoderSettings, draft, "model.draft").filename
    except ValueError as problem:
        raise BundleError(f"{path}: {problem}: export it again") from None
    if not file or Path(file).name != file:
        raise BundleError(f"{path} names {file!r:.60} as the draft's graph, expected a file of the bundle")
    return file
