"""The rules of a `decoder-pipeline`: windows, the cache between them, and stages that hand values on.

Each rule is a way in which some onnxruntime-genai from 0.12.2 on refuses such a file or answers wrongly in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from toolkit.bundle.genai_config import PIPELINE_TYPE
from toolkit.bundle.settings import DecoderSettings, GenaiConfig, PipelineStage
from toolkit.graph.interface import GraphInterface, ValueType

_LENGTHS: Final = {
    "past_sequence_length": ValueType("INT32", (1, 1)),
    "total_sequence_length": ValueType("INT32", (1,)),
}
_PHASES: Final = {"run_on_prompt": "on prompts", "run_on_token_gen": "in decoding"}
Stages = Mapping[str, tuple[PipelineStage, GraphInterface]]


def lint_pipeline(config: GenaiConfig, stages: Stages) -> list[str]:
    """Returns one line for each thing wrong with a pipeline whose graphs are there; `stages` is (settings, graph) by
    name."""
    decoder = config.model.decoder
    return [
        *_settings(config),
        *_runs({name: stage for name, (stage, _) in stages.items()}),
        *_length_inputs(decoder.inputs, stages),
        *_hand_over(decoder, stages),
        *_sizes(decoder.sliding_window.window_size, config.model.context_length, stages),
        *_caches(decoder, stages),
    ]


def _settings(config: GenaiConfig) -> list[str]:
    """Windows and the shared cache."""
    problems = []
    model, sliding = config.model, config.model.decoder.sliding_window
    context, window = model.context_length, sliding.window_size
    if model.type != PIPELINE_TYPE:
        problems.append(f"model.type is {model.type!r}, expected {PIPELINE_TYPE!r} with model.decoder.pipeline")
    if window is None or window < 2:
        problems.append(f"model.decoder.sliding_window.window_size is {window!r}, expected at least 2")
    elif context is not None and context % window:
        problems.append(
            f"model.decoder.sliding_window.window_size {window} does not divide model.context_length {context}: the "
            "last window of a prompt would reach past the cache"
        )
    if sliding.slide_key_value_cache:
        problems.append("model.decoder.sliding_window.slide_key_value_cache is not false: only a uint8 cache can slide")
    if not sliding.slide_inputs:
        problems.append("model.decoder.sliding_window.slide_inputs is not true: the stages take one window at a time")
    if sliding.alignment != "left":
        problems.append("model.decoder.sliding_window.alignment is not left: pads would come first and shift positions")
    if config.search.chunk_size != context:
        problems.append(
            f"search.chunk_size is {config.search.chunk_size}, not model.context_length {context}: 0.16.0 would size "
            "the cache at window + 16"
        )
    if model.decoder.session_options.provider_options:
        problems.append(
            "model.decoder.session_options.provider_options is not empty: onnxruntime-genai would keep the cache with "
            "that provider and refuse the stages of others"
        )
    return problems


def _runs(stages: Mapping[str, PipelineStage]) -> list[str]:
    """Prompt and decoding each end in the one LM head."""
    heads = [name for name, stage in stages.items() if stage.is_lm_head]
    if len(heads) != 1:
        return [f"{len(heads)} stages have is_lm_head, expected one: it runs on the last window alone"]
    problems = []
    for phase in _PHASES:
        running = [name for name, stage in stages.items() if _runs_in(stage, phase)]
        if heads[0] not in running or len(running) < 2:
            problems.append(f"{phase} leaves {' and '.join(running) or 'nothing'} to run, which gives no logits")
    return problems


def _length_inputs(inputs: Mapping[str, str], stages: Stages) -> list[str]:
    """int32 [1, 1] and [1]: what a windowed pipeline is given."""
    problems = []
    for key, expected in _LENGTHS.items():
        name = inputs.get(key)
        users = {stage: graph.inputs[name] for stage, (_, graph) in stages.items() if name in graph.inputs}
        if not users:
            problems.append(f"model.decoder.inputs.{key} is {name!r}, which no stage takes: both are given or none")
        problems += [
            f"stage {stage} takes {name} as {_words(found)}, onnxruntime-genai gives {_words(expected)}"
            for stage, found in users.items()
            if found != expected
        ]
    return problems


def _hand_over(decoder: DecoderSettings, stages: Stages) -> list[str]:
    """Each stage's names are its graph's; what it takes is managed by onnxruntime-genai or made, in each phase it runs
    in, by an earlier stage that runs there too, in the same dtype."""
    managed = _managed(decoder)
    made: dict[str, list[tuple[PipelineStage, str]]] = {}
    problems = []
    for stage, (section, graph) in stages.items():
        sides = (("input", section.inputs, graph.inputs), ("output", section.outputs, graph.outputs))
        for side, listed, values in sides:
            unknown, unlisted = [n for n in listed if n not in values], [n for n in values if n not in listed]
            problems += [f"stage {stage} lists {side} {name!r}, which its graph does not have" for name in unknown]
            problems += [f"stage {stage} does not list its graph's {side} {name!r}" for name in unlisted]
        for name in graph.inputs:
            if name in managed:
                continue
            makers = made.get(name, [])
            if not makers:
                problems.append(f"stage {stage} takes {name!r}, which no stage before it and no genai input gives")
                continue
            for phase, words in _PHASES.items():
                if _runs_in(section, phase) and not any(_runs_in(earlier, phase) for earlier, _ in makers):
                    problems.append(f"stage {stage} takes {name!r} {words}, where no stage before it makes it")
            meeting = [dtype for earlier, dtype in makers if _meet(earlier, section)]
            problems += [
                f"stage {stage} takes {name} as {graph.inputs[name].dtype}, a stage before it makes {dtype}"
                for dtype in meeting
                if dtype != graph.inputs[name].dtype
            ]
        for name, value in graph.outputs.items():
            known_as = section.output_names_forwarder.get(name, name)
            made.setdefault(known_as, []).append((section, value.dtype))
    return problems


def _sizes(window: int | None, context: int | None, stages: Stages) -> list[str]:
    """Fixed sizes of the graphs: a window of queries on prompts, one in decoding, and a cache of the whole context."""
    problems = []
    for stage, (section, graph) in stages.items():
        for value in graph.inputs.values():
            if len(value.shape) == 4 and isinstance(value.shape[2], int) and value.shape[2] != context:
                problems.append(f"stage {stage} has a cache of {value.shape[2]}, model.context_length is {context}")
                break
        lengths = {value.shape[1] for value in graph.inputs.values() if len(value.shape) == 3}
        given = {"run_on_prompt": window if window and window > 1 else None, "run_on_token_gen": 1}
        for phase, expected in given.items():
            wrong = [length for length in lengths if isinstance(length, int) and length != expected]
            if _runs_in(section, phase) and wrong and expected:
                problems.append(f"stage {stage} takes {wrong[0]} positions and is given {expected} {_PHASES[phase]}")
    return problems


def _caches(decoder: DecoderSettings, stages: Stages) -> list[str]:
    """Each layer's cache goes through one part in both phases: one that is left out keeps its zeros, in silence."""
    pattern = decoder.inputs.get("past_key_names", "")
    names = [pattern % layer for layer in range(decoder.num_hidden_layers)] if "%d" in pattern else []
    known = [name for name in names if any(name in graph.inputs for _, graph in stages.values())]
    problems = []
    for phase, words in _PHASES.items():
        running = [graph for section, graph in stages.values() if _runs_in(section, phase)]
        users = {name: sum(name in graph.inputs for graph in running) for name in known}
        wrong = [name for name in known if users[name] != 1] if len(set(users.values())) > 1 else []
        problems += [f"{name} goes through {users[name] or 'no'} stages {words}, expected one" for name in wrong[:1]]
    return problems


def _managed(decoder: DecoderSettings) -> set[str]:
    """Graph inputs that onnxruntime-genai fills itself."""
    layers = range(decoder.num_hidden_layers)
    names: set[str] = set()
    for pattern in decoder.inputs.values():
        names.update([pattern % i for i in layers] if "%d" in pattern else [pattern])
    return names


def _runs_in(stage: PipelineStage, phase: str) -> bool:
    return stage.run_on_prompt if phase == "run_on_prompt" else stage.run_on_token_gen


def _meet(earlier: PipelineStage, later: PipelineStage) -> bool:
    """Whether two stages run in the same phase."""
    return any(_runs_in(earlier, phase) and _runs_in(later, phase) for phase in _PHASES)


def _words(value: ValueType) -> str:
    return f"{value.dtype}{list(value.shape)}"
