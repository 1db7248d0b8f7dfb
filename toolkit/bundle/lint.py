"""`genai_config.json` against the graph beside it and against what onnxruntime-genai 0.12.2 and later read.

onnxruntime-genai refuses an unknown key, and takes in silence a pad id that occurs in text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from toolkit import names
from toolkit.bundle.genai_config import read_genai_config
from toolkit.graph.interface import GraphInterface, read_interface

# What every version from 0.12.2 on reads of one-graph decoders, by object (src/config.cpp of onnxruntime-genai).
_KEYS: Final = {
    "": {"model", "search"},
    "model": {
        "type", "vocab_size", "context_length", "pad_token_id", "eos_token_id", "bos_token_id", "decoder",
    },
    "model.decoder": {
        "filename", "hidden_size", "head_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
        "inputs", "outputs", "session_options",
    },
    "search": {
        "min_length", "max_length", "num_beams", "num_return_sequences", "batch_size", "top_k", "top_p", "temperature",
        "repetition_penalty", "length_penalty", "diversity_penalty", "no_repeat_ngram_size", "random_seed",
        "do_sample", "early_stopping", "past_present_share_buffer", "chunk_size",
    },
}  # fmt: skip
_LAYERED: Final = ("past_key_names", "past_value_names", "present_key_names", "present_value_names")


def lint_bundle(bundle: Path) -> list[str]:
    """One line for each thing wrong, empty when all is well.

    Raises BundleError if the file is missing or is not a JSON object.
    """
    config = read_genai_config(bundle)
    problems = _unknown_keys(config)
    model, search = config.get("model", {}), config.get("search", {})
    decoder = model.get("decoder", {})
    graph = bundle / str(decoder.get("filename", ""))
    if Path(str(decoder.get("filename"))).name != decoder.get("filename") or not graph.is_file():
        return [*problems, f"model.decoder.filename {decoder.get('filename')!r} names no file of the bundle"]
    interface = read_interface(graph)
    problems += _wiring(decoder, interface)
    problems += _shapes(model, decoder, interface)
    problems += _lengths(model, search)
    problems += _pad(model, bundle)
    return problems


def _unknown_keys(config: dict[str, Any]) -> list[str]:
    problems = []
    for path, known in _KEYS.items():
        place: Any = config
        for part in filter(None, path.split(".")):
            place = place.get(part, {}) if isinstance(place, dict) else {}
        for key in sorted(set(place) - known):
            problems.append(f"{path or 'the root'} has {key!r}, which not every onnxruntime-genai from 0.12.2 on reads")
    return problems


def _wiring(decoder: dict[str, Any], interface: GraphInterface) -> list[str]:
    """Every name given is the graph's, and every input and output of the graph has a name given."""
    problems = []
    layers = int(decoder.get("num_hidden_layers", 0))
    for side, values in (("inputs", interface.inputs), ("outputs", interface.outputs)):
        named: set[str] = set()
        for key, name in decoder.get(side, {}).items():
            expanded = [name % i for i in range(layers)] if key in _LAYERED and "%d" in name else [name]
            named.update(expanded)
            if missing := [n for n in expanded if n not in values]:
                problems.append(f"model.decoder.{side}.{key} names {missing[0]!r}, which the graph does not have")
        for name in sorted(values.keys() - named):
            problems.append(f"the graph's {side[:-1]} {name!r} is not named in model.decoder.{side}")
    return problems


def _shapes(model: dict[str, Any], decoder: dict[str, Any], interface: GraphInterface) -> list[str]:
    """The cache's and the logits' fixed dimensions against the numbers of the file."""
    problems = []
    logits = interface.outputs.get(str(decoder.get("outputs", {}).get("logits")))
    if logits and logits.shape[-1] != model.get("vocab_size"):
        problems.append(f"model.vocab_size is {model.get('vocab_size')}, the graph's logits have {logits.shape[-1]}")
    pattern = str(decoder.get("inputs", {}).get("past_key_names", ""))
    past = interface.inputs.get(pattern % 0 if "%d" in pattern else pattern)
    for axis, key in ((1, "num_key_value_heads"), (3, "head_size")):
        if past and past.shape[axis] != decoder.get(key):
            problems.append(f"model.decoder.{key} is {decoder.get(key)}, the graph's cache has {past.shape[axis]}")
    return problems


def _lengths(model: dict[str, Any], search: dict[str, Any]) -> list[str]:
    problems = []
    context, longest = model.get("context_length", 0), search.get("max_length", 0)
    if not isinstance(context, int) or context < 1:
        problems.append(f"model.context_length is {context!r}, expected a token count")
    elif longest > context:
        problems.append(f"search.max_length {longest} is more than model.context_length {context}")
    if search.get("past_present_share_buffer") is not True:
        problems.append("search.past_present_share_buffer is not true: the cache would be copied at every token")
    return problems


def _pad(model: dict[str, Any], bundle: Path) -> list[str]:
    """A pad id inside a prompt gives wrong tokens in silence, on every version."""
    pad, eos = model.get("pad_token_id"), model.get("eos_token_id")
    if pad in (eos if isinstance(eos, list) else [eos]):
        return [f"model.pad_token_id {pad} is an end of sentence, which stands between the turns of a conversation"]
    try:
        tokenizer = json.loads((bundle / names.TOKENIZER_FILE).read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if isinstance(vocabulary, dict) and pad in vocabulary.values():
        return [f"model.pad_token_id {pad} is a token of text"]
    return []
