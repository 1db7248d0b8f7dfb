"""`genai_config.json` for one graph or a pipeline, in the subset every onnxruntime-genai from 0.12.2 on accepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from toolkit import names
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.families import FAMILIES
from toolkit.checkpoint.family import DECODER
from toolkit.checkpoint.side_files import Sampling, SideFiles
from toolkit.errors import UnsupportedError
from toolkit.speculation import CHUNK_SIZE
from toolkit.target import CPU_EP, Stage, Target

if TYPE_CHECKING:
    from toolkit.graph.builder import StageGraph

# Reserved tokens that never stand in text. The distills ship pad = eos, and eos stands between turns.
_PAD_TOKENS: Final = ("<|fim_pad|>", "<|finetune_right_pad_id|>")
_MAX_TOKENIZER_BYTES: Final = 256 << 20
_UNASKED_LENGTH: Final = 4096
# A gigabyte of float32: of as many tokens of a prompt at once as make so many with all before them.
_MOST_SCORES: Final = 1 << 28
PIPELINE_TYPE: Final = "decoder-pipeline"
# Types of a text decoder that onnxruntime-genai 0.12.2 and 0.18.0 both load, each tried; they compute the same. The
# last has states beside its cache, which 0.12.2 does not know: it is 0.18.0's alone.
GENAI_TYPES: Final = (
    "chatglm",
    "decoder",
    "ernie4_5",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gptoss",
    "granite",
    "internlm2",
    "llama",
    "mistral",
    "nemotron",
    "olmo",
    "phi",
    "phi3",
    "phi3small",
    "phimoe",
    "qwen2",
    "qwen3",
    "smollm3",
    "qwen3_5_text",
)
# The first onnxruntime and onnxruntime-genai that a type was run with, where not every one does.
_FIRST_RELEASES: Final = {"qwen3_5_text": ("1.32", "0.18.0")}
_PAST: Final = {"past_key_names": names.past_key("%d"), "past_value_names": names.past_value("%d")}
_PRESENT: Final = {"present_key_names": names.present_key("%d"), "present_value_names": names.present_value("%d")}
_PAST_STATES: Final = {"past_conv_names": names.past_conv("%d"), "past_recurrent_names": names.past_recurrent("%d")}
_PRESENT_STATES: Final = {
    key.replace("past", "present"): names.present_of(pattern) for key, pattern in _PAST_STATES.items()
}
# After how many tokens onnxruntime-genai reads a text of a type anew, by LongRoPE's long factors (generators.cpp).
_READ_ANEW: Final = {"phi3": 4096}
# When a stage runs, where that is not always.
_RUNS: Final[dict[str, dict[str, bool]]] = {
    names.CONTEXT: {"run_on_token_gen": False},
    names.ITERATOR: {"run_on_prompt": False},
    names.HEAD: {"is_lm_head": True},
}


def genai_config(
    config: ModelConfig, side: SideFiles, stop_ids: Sequence[int], context_length: int, graphs: Sequence[StageGraph]
) -> Mapping[str, object]:
    """Composes the whole file as an object; `stop_ids` end an answer, `side` has how text is to be sampled."""
    bos, cache = side.generation.bos_token_id, _Cache(config, graphs)
    model = {
        "type": genai_type(config) if len(graphs) == 1 else PIPELINE_TYPE,
        "vocab_size": config.vocab_size,
        "context_length": context_length,
        "pad_token_id": pad_token_id(config, side),
        "eos_token_id": list(stop_ids),
        "bos_token_id": config.bos_token_id if bos is None else bos,
        "decoder": {
            "hidden_size": config.hidden_size,
            "head_size": cache.width,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": cache.heads,
            "num_hidden_layers": cache.layers,
            **(_one_graph(graphs[0]) if len(graphs) == 1 else _pipeline(graphs)),
        },
    }
    search = {
        "max_length": unasked_length(context_length, len(graphs) > 1),
        **({"chunk_size": chunk} if (chunk := _chunk_size(config, context_length, graphs)) else {}),
        "past_present_share_buffer": not cache.grows,
        **_sampling(side.generation.sampling, config.vocab_size),
    }
    if model["bos_token_id"] is None:
        del model["bos_token_id"]
    return {"model": model, "search": search}


class _Cache:
    """What the graphs' cache is made of: how many pairs of key and value, the heads of each and how wide they are.
    Latents and traced graphs have no operator that writes into the cache it is given, so that theirs `grows`."""

    def __init__(self, config: ModelConfig, graphs: Sequence[StageGraph]) -> None:
        taken = [value for graph in graphs for value in graph.model.graph.inputs if names.is_past(str(value.name))]
        past = [value for value in taken if not names.is_state(str(value.name))]
        shapes = {tuple(value.shape)[1::2] for value in past if value.shape is not None}
        ((self.heads, self.width),) = shapes or {(config.num_key_value_heads, config.head_dim)}
        operators = {node.op_type for graph in graphs for node in graph.model.graph}
        latents_or_traced = config.structure.latent is not None or config.traced
        self.grows = latents_or_traced and "GroupQueryAttention" not in operators
        self.layers = len(past) // 2 if self.grows else config.num_hidden_layers


def unasked_length(context_length: int, is_pipeline: bool) -> int:
    """How many tokens prompt and answer have together where an app does not say: the cache is allocated whole for
    them. A pipeline's stages are told this number as their cache's length."""
    return context_length if is_pipeline else min(context_length, _UNASKED_LENGTH)


def check_switch(target: Target, config: ModelConfig, context_length: int) -> None:
    """Raises UnsupportedError for a context that LongRoPE turns in two ways, unless the text is read anew at that
    length: one graph on the CPU of a type for which onnxruntime-genai does so."""
    switch = config.rope.switch(context_length)
    if switch is None:
        return
    if target.partitioned or target.accelerator.execution_provider != CPU_EP:
        raise UnsupportedError(
            f"{config.model_type} turns texts of more than {switch} tokens by other factors (LongRoPE) and has to read "
            f"them anew, which target {target.name} cannot: convert it for target cpu, or set context_length={switch}"
        )
    if _READ_ANEW.get(genai_type(config)) != switch:
        raise UnsupportedError(
            f"{config.model_type} turns texts of more than {switch} tokens by other factors (LongRoPE), and "
            f"onnxruntime-genai does not read one anew there: set context_length={switch}"
        )


def _chunk_size(config: ModelConfig, context_length: int, graphs: Sequence[StageGraph]) -> int:
    # Nor can a prompt's first chunk know that the whole is longer than LongRoPE's switch.
    if len(graphs) == 1 and config.rope.switch(context_length) is not None:
        return 0
    # 0.16.0 sizes the cache of a pipeline at window + 16 unless a chunk is the whole context.
    if len(graphs) > 1:
        return context_length
    chunk = CHUNK_SIZE if _has_logits_of_all(graphs[0]) else graphs[0].stage.chunk_size
    if not _Cache(config, graphs).grows:
        return chunk
    # Scores of all heads stand in memory at once.
    return max(min(chunk, _MOST_SCORES // (config.num_attention_heads * context_length)), 1)


def _has_logits_of_all(graph: StageGraph) -> bool:
    """Whether a graph's logits have a row for every position, and onnxruntime-genai a buffer for as many."""
    logits = next(value for value in graph.model.graph.outputs if value.name == names.LOGITS)
    return logits.shape is not None and logits.shape[1] != 1


def _sampling(given: Sampling, vocab_size: int) -> dict[str, bool | int | float]:
    """What onnxruntime-genai's `search` reads of it: all but min_p, for which 0.18 has no key."""
    optional = ("repetition_penalty", "no_repeat_ngram_size", "min_length")
    return {
        "do_sample": bool(given.do_sample),
        "temperature": 1.0 if given.temperature is None else given.temperature,
        # It refuses to sample from more tokens than there are.
        "top_k": min(50 if given.top_k is None else given.top_k, vocab_size),
        "top_p": 1.0 if given.top_p is None else given.top_p,
        **{key: value for key in optional if (value := getattr(given, key)) is not None},
    }


def genai_type(config: ModelConfig) -> str:
    """Returns `model.type` of one graph; raises UnsupportedError if the family names one that does not exist."""
    found = DECODER if config.traced else FAMILIES[config.model_type].genai_type
    if found not in GENAI_TYPES:
        raise UnsupportedError(
            f"families/{config.model_type}.py has genai_type {found!r}, which onnxruntime-genai would refuse to load: "
            f"expected one of {', '.join(GENAI_TYPES)}; decoder fits any family"
        )
    return found


def first_releases(model_type: str | None) -> tuple[str, str]:
    """Returns the first onnxruntime and onnxruntime-genai that run a bundle of this `model.type`."""
    return _FIRST_RELEASES.get(model_type or "", ("1.23", "0.12.2"))


def _one_graph(graph: StageGraph) -> Mapping[str, object]:
    known = (names.INPUT_IDS, names.ATTENTION_MASK, names.POSITION_IDS, names.HIDDEN_STATES)
    # What a model gives its MTP head is named in speculation.json: earlier releases refuse the key.
    gives = names.HIDDEN_STATES_OUT in graph.outputs
    further = {names.HIDDEN_STATES: names.HIDDEN_STATES_OUT} if gives else {}
    has_states = any(map(names.is_state, graph.inputs))
    past, present = (_PAST | _PAST_STATES, _PRESENT | _PRESENT_STATES) if has_states else (_PAST, _PRESENT)
    return {
        "filename": graph.stage.file,
        "session_options": _session_options(graph.stage),
        "inputs": {**{name: name for name in known if name in graph.inputs}, **past},
        "outputs": {"logits": names.LOGITS, **further, **present},
    }


def _pipeline(graphs: Sequence[StageGraph]) -> Mapping[str, object]:
    """Stages with a shared cache. The default session options name no provider: the cache lives with the CPU."""
    stages = {}
    for graph in graphs:
        stages[graph.stage.name] = {
            "filename": graph.stage.file,
            "inputs": graph.inputs,
            "outputs": graph.outputs,
            **_RUNS.get(graph.stage.kind, {}),
            "session_options": _session_options(graph.stage),
        }
    window = next(graph.stage.sequence_length for graph in graphs if graph.stage.kind == names.CONTEXT)
    lengths = {"past_sequence_length": names.PAST_SEQ_LEN, "total_sequence_length": names.TOTAL_SEQ_LEN}
    return {
        "session_options": {"provider_options": []},
        "inputs": {"input_ids": names.INPUT_IDS, **lengths, **_PAST},
        "outputs": {"logits": names.LOGITS, **_PRESENT},
        "sliding_window": {"window_size": window, "pad_value": 0, "alignment": "left", "slide_key_value_cache": False},
        "pipeline": [stages],
    }


def _session_options(stage: Stage) -> Mapping[str, object]:
    provider = [{stage.provider: dict(stage.provider_options)}] if stage.provider else []
    # 0 threads lets ORT choose one per core; genai's own default is half of the logical ones.
    return {
        "intra_op_num_threads": stage.threads,
        "session.set_denormal_as_zero": "1",
        **stage.session_options,
        "provider_options": provider,
    }


def pad_token_id(config: ModelConfig, side: SideFiles) -> int:
    """Returns an id that does not stand in text: a reserved token, else a row of the embedding that the tokenizer never
    emits, else an added token that no chat template writes and nothing ends with.

    Where there is none, it is what the checkpoint pads with.
    """
    added = {} if side.vocabulary is None else side.vocabulary.added
    for token in _PAD_TOKENS:
        if token in added:
            return added[token]
    used = frozenset() if side.vocabulary is None else side.vocabulary.ids
    unused = (row for row in range(config.vocab_size - 1, -1, -1) if row not in used)
    if (row := next(unused, None)) is not None:
        return row
    ends = {*config.eos_token_ids, *side.generation.eos_token_ids, config.bos_token_id}
    spare = [
        token_id
        for token, token_id in added.items()
        if token_id not in ends and token_id < config.vocab_size and not any(token in text for text in side.templates)
    ]
    if spare:
        return max(spare)
    if config.pad_token_id is not None:
        return config.pad_token_id
    return config.eos_token_ids[0] if config.eos_token_ids else 0
