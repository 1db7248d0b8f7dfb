"""`genai_config.json` against the graphs beside it and against what onnxruntime-genai 0.12.2 and later read.

onnxruntime-genai refuses an unknown key, and takes in silence a pad id that occurs in text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from toolkit import names
from toolkit.bundle.genai_config import GENAI_TYPES, read_genai_config
from toolkit.bundle.lint_pipeline import lint_pipeline
from toolkit.graph.interface import GraphInterface, read_interface
from toolkit.typed_json import JsonObject

# What every version from 0.12.2 on reads, by object, `*` for any stage (src/config.cpp of onnxruntime-genai).
_KEYS: Final = {
    "": {"model", "search", "engine"},
    "model": {
        "type",
        "vocab_size",
        "context_length",
        "pad_token_id",
        "eos_token_id",
        "bos_token_id",
        "decoder",
        "decoder_start_token_id",
        "sep_token_id",
    },
    "model.decoder": {
        "filename",
        "hidden_size",
        "head_size",
        "num_attention_heads",
        "num_key_value_heads",
        "num_hidden_layers",
        "inputs",
        "outputs",
        "session_options",
        "run_options",
        "sliding_window",
        "pipeline",
    },
    "model.decoder.inputs": {
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "past_key_names",
        "past_value_names",
        "past_names",
        "past_sequence_length",
        "current_sequence_length",
        "total_sequence_length",
        "past_key_values_length",
    },
    "model.decoder.outputs": {"logits", "present_key_names", "present_value_names", "present_names"},
    "model.decoder.sliding_window": {
        "window_size",
        "pad_value",
        "alignment",
        "slide_key_value_cache",
        "slide_inputs",
        "layers",
    },
    "model.decoder.pipeline.*": {
        "filename",
        "inputs",
        "outputs",
        "run_on_prompt",
        "run_on_token_gen",
        "is_lm_head",
        "reset_session_idx",
        "output_names_forwarder",
        "session_options",
        "run_options",
    },
    "search": {
        "min_length",
        "max_length",
        "num_beams",
        "num_return_sequences",
        "batch_size",
        "top_k",
        "top_p",
        "temperature",
        "repetition_penalty",
        "length_penalty",
        "diversity_penalty",
        "no_repeat_ngram_size",
        "random_seed",
        "do_sample",
        "early_stopping",
        "past_present_share_buffer",
        "chunk_size",
    },
}
# Keys of later versions, by the first that reads them: earlier ones refuse the file.
_SINCE: Final = {
    "bor_token_id": "0.15",
    "eor_token_id": "0.15",
    "bot_token_id": "0.15",
    "eot_token_id": "0.15",
    "tokenizer_dir": "0.15",
    "layer_types": "0.15",
    "conv_cache_size": "0.15",
    "blank_penalty": "0.15",
    "cache_slack": "0.16",
    "inherit_session_options": "0.16",
    "shared_initializers": "0.16",
    "speculative": "0.16",
    "draft": "0.16",
    "mtp": "0.16",
    "audio_output": "0.17",
}
_LAYERED: Final = ("past_key_names", "past_value_names", "present_key_names", "present_value_names")


def lint_bundle(bundle: Path) -> list[str]:
    """Returns one line for each thing wrong, empty when all is well.

    Raises BundleError if the file is missing or is not a JSON object, or a graph cannot be read.
    """
    config = read_genai_config(bundle)
    if malformed := _malformed(config):
        return malformed
    problems = _unknown_keys(config)
    model, search = config.get("model", {}), config.get("search", {})
    decoder = model.get("decoder", {})
    pipeline = decoder.get("pipeline")
    sections = {name: stage for group in pipeline or [] for name, stage in group.items()} or {"model": decoder}
    graphs = {}
    for name, section in sections.items():
        at = f"stage {name}'s filename" if pipeline else "model.decoder.filename"
        filename = section.get("filename")
        if not isinstance(filename, str) or Path(filename).name != filename or not (bundle / filename).is_file():
            problems.append(f"{at} {filename!r} names no file of the bundle")
        else:
            graphs[name] = (section, read_interface(bundle / filename))
    if len(graphs) < len(sections):
        return problems
    if not pipeline and model.get("type") not in GENAI_TYPES:
        problems.append(f"model.type is {model.get('type')!r}, expected one of {', '.join(GENAI_TYPES)}")
    problems += lint_pipeline(config, graphs) if pipeline else _unnamed(decoder, graphs["model"][1])
    problems += _named(decoder, [graph for _, graph in graphs.values()])
    for _, graph in graphs.values():
        problems += _shapes(model, decoder, graph)
    problems += _lengths(model, search)
    problems += _stops(model)
    problems += _pad(model, bundle)
    return problems


def _malformed(config: JsonObject) -> list[str]:
    """Values of a type that no rule after this one could read."""
    problems = []
    for path in ("model", "search", "model.decoder", *(path for path in _KEYS if path.startswith("model.decoder."))):
        *parents, last = path.split(".")
        for at, found in _objects(config, ".".join(parents)):
            keys = list(found) if last == "*" else [last]
            wrong = [key for key in keys if key in found and not isinstance(found[key], dict) and key != "pipeline"]
            problems += [f"{at}.{key}".lstrip(".") + f" is {found[key]!r:.60}, expected an object" for key in wrong]
    decoder = config.get("model", {}).get("decoder", {}) if not problems else {}
    pipeline = decoder.get("pipeline", [])
    if isinstance(pipeline, dict):
        problems.append("model.decoder.pipeline is an object: only an array is read by every version")
    elif not isinstance(pipeline, list) or not all(isinstance(group, dict) for group in pipeline):
        problems.append("model.decoder.pipeline is not an array of objects")
    for at, key in (("model", "context_length"), ("search", "max_length"), ("model.decoder", "num_hidden_layers")):
        for _, found in _objects(config, at):
            if key in found and (isinstance(found[key], bool) or not isinstance(found[key], int)):
                problems.append(f"{at}.{key} is {found[key]!r}, expected a number")
    for side in ("inputs", "outputs"):
        for at, found in _objects(config, f"model.decoder.{side}"):
            wrong = [key for key, name in found.items() if not _is_pattern(name)]
            problems += [f"{at}.{key} is {found[key]!r}, expected a name, with one %d at most" for key in wrong]
    return problems


def _is_pattern(name: Any) -> bool:
    return isinstance(name, str) and name.count("%") == name.count("%d") <= 1


def _unknown_keys(config: JsonObject) -> list[str]:
    problems = []
    for path, known in _KEYS.items():
        for at, found in _objects(config, path):
            for key in sorted(set(found) - known):
                since = f"only {_SINCE[key]} and later read" if key in _SINCE else "no version is known to read"
                problems.append(
                    f"{at or 'the root'} has {key!r}, which {since}: not every onnxruntime-genai from 0.12.2 on"
                )
    return problems


def _objects(config: JsonObject, path: str) -> list[tuple[str, JsonObject]]:
    """(key path, object) for each that a path means; arrays are looked through, `*` is every key."""
    found: list[tuple[str, Any]] = [("", config)]
    for part in filter(None, path.split(".")):
        step: list[tuple[str, Any]] = []
        for at, value in found:
            for entry in value if isinstance(value, list) else [value]:
                if isinstance(entry, dict):
                    keys = list(entry) if part == "*" else [part]
                    step += [(f"{at}.{key}".lstrip("."), entry[key]) for key in keys if key in entry]
        found = step
    spread = [(at, entry) for at, value in found for entry in (value if isinstance(value, list) else [value])]
    return [(at, entry) for at, entry in spread if isinstance(entry, dict)]


def _named(decoder: JsonObject, graphs: list[GraphInterface]) -> list[str]:
    """Every name given is some graph's."""
    problems = []
    for side in ("inputs", "outputs"):
        values = {name for graph in graphs for name in (graph.inputs if side == "inputs" else graph.outputs)}
        for key, name in decoder.get(side, {}).items():
            if missing := [n for n in _expanded(decoder, key, name) if n not in values]:
                problems.append(f"model.decoder.{side}.{key} names {missing[0]!r}, which the graph does not have")
    return problems


def _unnamed(decoder: JsonObject, graph: GraphInterface) -> list[str]:
    """Inputs and outputs of a single graph that have no name given."""
    problems = []
    for side, values in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        named = {n for key, name in decoder.get(side, {}).items() for n in _expanded(decoder, key, name)}
        for name in sorted(values.keys() - named):
            problems.append(f"the graph's {side[:-1]} {name!r} is not named in model.decoder.{side}")
    return problems


def _expanded(decoder: JsonObject, key: str, name: str) -> list[str]:
    layers = range(int(decoder.get("num_hidden_layers", 0)))
    return [name % i for i in layers] if key in _LAYERED and "%d" in name else [name]


def _shapes(model: JsonObject, decoder: JsonObject, interface: GraphInterface) -> list[str]:
    """The cache's and the logits' fixed dimensions against the numbers of the file."""
    problems = []
    logits = interface.outputs.get(str(decoder.get("outputs", {}).get("logits")))
    if logits and logits.shape[-1] != model.get("vocab_size"):
        problems.append(f"model.vocab_size is {model.get('vocab_size')}, the graph's logits have {logits.shape[-1]}")
    pattern = str(decoder.get("inputs", {}).get("past_key_names", ""))
    keys = _expanded(decoder, "past_key_names", pattern)
    past = next((interface.inputs[key] for key in keys if key in interface.inputs), None)
    for axis, key in ((1, "num_key_value_heads"), (3, "head_size")):
        if past and past.shape[axis] != decoder.get(key):
            problems.append(f"model.decoder.{key} is {decoder.get(key)}, the graph's cache has {past.shape[axis]}")
    return problems


def _lengths(model: JsonObject, search: JsonObject) -> list[str]:
    problems = []
    context, longest = model.get("context_length", 0), search.get("max_length", 0)
    if not isinstance(context, int) or context < 1:
        problems.append(f"model.context_length is {context!r}, expected a token count")
    elif longest > context:
        problems.append(f"search.max_length {longest} is more than model.context_length {context}")
    if search.get("past_present_share_buffer") is not True:
        problems.append("search.past_present_share_buffer is not true: the cache would be copied at every token")
    return problems


def _stops(model: JsonObject) -> list[str]:
    """Without an id that ends an answer, or with one beyond the logits, a bundle writes on to its limit."""
    eos, rows = model.get("eos_token_id"), model.get("vocab_size")
    given = eos if isinstance(eos, list) else [eos]
    ids = [one for one in given if isinstance(one, int) and not isinstance(one, bool)]
    if not ids or len(ids) < len(given):
        return [f"model.eos_token_id is {eos!r:.60}, expected an id that ends an answer, or a list of them"]
    beyond = [one for one in ids if one < 0 or (isinstance(rows, int) and one >= rows)]
    return [f"model.eos_token_id {one} is no id of the vocabulary's {rows}" for one in beyond]


def _pad(model: JsonObject, bundle: Path) -> list[str]:
    """A pad id inside a prompt gives wrong tokens in silence, on every version."""
    pad, eos = model.get("pad_token_id"), model.get("eos_token_id")
    if isinstance(pad, bool) or not isinstance(pad, int):
        return [f"model.pad_token_id is {pad!r}, expected an id that never stands in text"]
    if pad in (eos if isinstance(eos, list) else [eos]):
        return [f"model.pad_token_id {pad} is an end of sentence, which stands between the turns of a conversation"]
    try:
        tokenizer = json.loads((bundle / names.TOKENIZER_FILE).read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
        added = {token["id"]: token["content"] for token in tokenizer.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if pad in added and "pad" not in str(added[pad]).lower():
        return [f"model.pad_token_id {pad} is {added[pad]!r}, which may stand in a conversation"]
    if isinstance(vocabulary, dict) and pad in vocabulary.values():
        return [f"model.pad_token_id {pad} is a token of text"]
    return []
