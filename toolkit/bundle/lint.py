"""`genai_config.json` against the graphs beside it and against what onnxruntime-genai 0.12.2 and later read.

onnxruntime-genai refuses an unknown key, and takes in silence a pad id that occurs in text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.bundle.genai_config import GENAI_TYPES
from toolkit.bundle.lint_pipeline import lint_pipeline
from toolkit.bundle.settings import DecoderSettings, GenaiConfig, ModelSettings, config_of, read_genai_config
from toolkit.bundle.speculative import further_outputs, lint_speculation
from toolkit.checkpoint.side_files import TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from toolkit.errors import BundleError
from toolkit.files import read_text
from toolkit.graph.interface import GraphInterface, read_interface
from toolkit.typed_json import Json

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
        # Of linear attention, which a type of 0.18 has.
        "past_conv_names",
        "past_recurrent_names",
    },
    "model.decoder.outputs": {
        "logits",
        "present_key_names",
        "present_value_names",
        "present_names",
        "present_conv_names",
        "present_recurrent_names",
    },
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
    "hidden_states": "0.16",
    "audio_output": "0.17",
}
_MAX_BYTES: Final = 256 << 20
# Names of every layer, each with what a layer of the other kind has in its place: keys and values, or states.
_LAYERED: Final = {
    "past_key_names": "past_conv_names",
    "past_value_names": "past_recurrent_names",
    "past_conv_names": "past_key_names",
    "past_recurrent_names": "past_value_names",
    "present_key_names": "present_conv_names",
    "present_value_names": "present_recurrent_names",
    "present_conv_names": "present_key_names",
    "present_recurrent_names": "present_value_names",
}


def lint_bundle(bundle: Path) -> list[str]:
    """Returns one line for each thing wrong, empty when all is well.

    Raises BundleError if the file is missing or is not a JSON object, or a graph cannot be read.
    """
    raw = read_genai_config(bundle)
    try:
        config = config_of(raw)
    except ValueError as problem:
        return [str(problem)]
    model, decoder = config.model, config.model.decoder
    if wrong := _patterns(decoder):
        return wrong
    problems = _unknown_keys(raw)
    pipeline = decoder.stages()
    files = {name: stage.filename for name, stage in pipeline.items()} or {names.MODEL: decoder.filename}
    graphs: dict[str, GraphInterface] = {}
    for name, file in files.items():
        if file is None or Path(file).name != file or not (bundle / file).is_file():
            at = f"stage {name}'s filename" if pipeline else "model.decoder.filename"
            problems.append(f"{at} {file!r} names no file of the bundle")
        else:
            graphs[name] = read_interface(bundle / file)
    if len(graphs) < len(files):
        return problems
    if pipeline:
        problems += lint_pipeline(config, {name: (pipeline[name], graph) for name, graph in graphs.items()})
    else:
        if model.type not in GENAI_TYPES:
            problems.append(f"model.type is {model.type!r}, expected one of {', '.join(GENAI_TYPES)}")
        problems += _unnamed(decoder, graphs[names.MODEL], further_outputs(bundle))
        problems += lint_speculation(bundle, graphs[names.MODEL])
    problems += _named(decoder, list(graphs.values()))
    for graph in graphs.values():
        problems += _shapes(model, graph)
    return [*problems, *_lengths(config), *_shared(config, graphs.values()), *_stops(model), *_pad(model, bundle)]


def _patterns(decoder: DecoderSettings) -> list[str]:
    """Names that no rule after this one could put a layer's number into."""
    return [
        f"model.decoder.{side}.{key} is {name!r}, expected a name, with one %d at most"
        for side, given in (("inputs", decoder.inputs), ("outputs", decoder.outputs))
        for key, name in given.items()
        if not name.count("%") == name.count("%d") <= 1
    ]


def _unknown_keys(config: Json) -> list[str]:
    problems = []
    for path, known in _KEYS.items():
        for at, found in _objects(config, path):
            for key in sorted(found - known):
                since = f"only {_SINCE[key]} and later read" if key in _SINCE else "no version is known to read"
                problems.append(
                    f"{at or 'the root'} has {key!r}, which {since}: not every onnxruntime-genai from 0.12.2 on"
                )
    return problems


def _objects(config: Json, path: str) -> list[tuple[str, set[str]]]:
    """(key path, keys) of each object that a path means; arrays are looked through, `*` is every key."""
    found: list[tuple[str, Json]] = [("", config)]
    for part in filter(None, path.split(".")):
        step: list[tuple[str, Json]] = []
        for at, value in found:
            for entry in value if isinstance(value, list) else [value]:
                if isinstance(entry, dict):
                    keys = list(entry) if part == "*" else [part]
                    step += [(f"{at}.{key}".lstrip("."), entry[key]) for key in keys if key in entry]
        found = step
    spread = [(at, entry) for at, value in found for entry in (value if isinstance(value, list) else [value])]
    return [(at, set(entry)) for at, entry in spread if isinstance(entry, dict)]


def _named(decoder: DecoderSettings, graphs: list[GraphInterface]) -> list[str]:
    """Every name given is some graph's."""
    problems = []
    for side, given in (("inputs", decoder.inputs), ("outputs", decoder.outputs)):
        values = {name for graph in graphs for name in (graph.inputs if side == "inputs" else graph.outputs)}
        for key, name in given.items():
            own, other = _expanded(decoder, key, name), given.get(_LAYERED.get(key, ""))
            instead = _expanded(decoder, key, other) if other and len(own) > 1 else [""] * len(own)
            if missing := [n for n, i in zip(own, instead, strict=False) if n not in values and i not in values]:
                problems.append(f"model.decoder.{side}.{key} names {missing[0]!r}, which the graph does not have")
    return problems


def _unnamed(decoder: DecoderSettings, graph: GraphInterface, further: frozenset[str]) -> list[str]:
    """Inputs and outputs of a single graph that have no name given; `further` outputs are named elsewhere."""
    problems = []
    sides = (("inputs", decoder.inputs, graph.inputs), ("outputs", decoder.outputs, graph.outputs))
    for side, given, values in sides:
        named = {n for key, name in given.items() for n in _expanded(decoder, key, name)}
        for name in sorted(values.keys() - named - further):
            problems.append(f"the graph's {side[:-1]} {name!r} is not named in model.decoder.{side}")
    return problems


def _expanded(decoder: DecoderSettings, key: str, name: str) -> list[str]:
    return [name % i for i in range(decoder.num_hidden_layers)] if key in _LAYERED and "%d" in name else [name]


def _shapes(model: ModelSettings, interface: GraphInterface) -> list[str]:
    """The cache's and the logits' fixed dimensions against the numbers of the file."""
    problems, decoder = [], model.decoder
    logits = interface.outputs.get(decoder.outputs.get("logits", ""))
    if logits and (last := logits.shape[-1] if logits.shape else None) != model.vocab_size:
        problems.append(f"model.vocab_size is {model.vocab_size}, the graph's logits have {last}")
    keys = _expanded(decoder, "past_key_names", decoder.inputs.get("past_key_names", ""))
    past = next((interface.inputs[key] for key in keys if key in interface.inputs), None)
    given = {"num_key_value_heads": decoder.num_key_value_heads, "head_size": decoder.head_size}
    for axis, (key, expected) in zip((1, 3), given.items(), strict=True):
        found = past.shape[axis] if past and len(past.shape) > axis else None
        if past and found != expected:
            problems.append(f"model.decoder.{key} is {expected}, the graph's cache has {found}")
    return problems


def _lengths(config: GenaiConfig) -> list[str]:
    problems = []
    context, longest = config.model.context_length or 0, config.search.max_length or 0
    if context < 1:
        problems.append(f"model.context_length is {context!r}, expected a token count")
    elif longest > context:
        problems.append(f"search.max_length {longest} is more than model.context_length {context}")
    return problems


def _shared(config: GenaiConfig, graphs: Iterable[GraphInterface]) -> list[str]:
    """An operator that writes into the cache it is given must get one; a cache of latents grows by Concat."""
    grows = not any(node.operator.endswith("GroupQueryAttention") for graph in graphs for node in graph.nodes)
    if config.search.past_present_share_buffer or (grows and not config.model.decoder.pipeline):
        return []
    return ["search.past_present_share_buffer is not true: the cache would be copied at every token"]


def _stops(model: ModelSettings) -> list[str]:
    """Without an id that ends an answer, or with one beyond the logits, a bundle writes on to its limit."""
    ids, rows = model.eos_token_id, model.vocab_size
    if not ids:
        return ["model.eos_token_id is [], expected an id that ends an answer, or a list of them"]
    beyond = [one for one in ids if one < 0 or (rows is not None and one >= rows)]
    return [f"model.eos_token_id {one} is no id of the vocabulary's {rows}" for one in beyond]


def _is_written(token: str, bundle: Path) -> bool:
    """Whether a chat template of the bundle has the token in it."""
    for name in (TEMPLATE_FILE, TOKENIZER_CONFIG_FILE):
        try:
            text = read_text(bundle / name, _MAX_BYTES, BundleError)
            written = text if name == TEMPLATE_FILE else str(json.loads(text).get("chat_template", ""))
        except (BundleError, ValueError, AttributeError, RecursionError):
            continue
        if token in written:
            return True
    return False


def _pad(model: ModelSettings, bundle: Path) -> list[str]:
    """A pad id inside a prompt gives wrong tokens in silence, on every version."""
    pad = model.pad_token_id
    if pad is None:
        return [f"model.pad_token_id is {pad!r}, expected an id that never stands in text"]
    if pad in model.eos_token_id:
        return [f"model.pad_token_id {pad} is an end of sentence, which stands between the turns of a conversation"]
    try:
        tokenizer = json.loads(read_text(bundle / names.TOKENIZER_FILE, _MAX_BYTES, BundleError))
        vocabulary = tokenizer["model"]["vocab"]
        added = {token["id"]: token["content"] for token in tokenizer.get("added_tokens", [])}
    except (BundleError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    if pad == model.bos_token_id:
        return [f"model.pad_token_id {pad} is the beginning of sentence, which stands in every prompt"]
    if pad in added:
        written = _is_written(str(added[pad]), bundle)
        where = f"model.pad_token_id {pad} is {added[pad]!r}"
        return [f"{where}, which the chat template writes into a conversation"] if written else []
    if isinstance(vocabulary, dict) and pad in vocabulary.values():
        return [f"model.pad_token_id {pad} is a token of text"]
    return []
