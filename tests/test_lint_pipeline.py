"""The linter of a pipeline: silent on what every target makes, and one line for each thing planted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from tests.graphs import recipe_for, write_graphs
from tests.pipeline_config import ITERATOR, copy_without_weights, setting_at
from toolkit.bundle.lint import lint_bundle
from toolkit.target import TARGETS

Edit = Callable[[dict[str, Any]], object]
GraphEdit = Callable[[onnx.GraphProto], object]
DECODER, SLIDING, SEARCH = "model.decoder", "model.decoder.sliding_window", "search"
EMBEDDINGS, CONTEXT, HEAD = (f"model.decoder.pipeline.0.{stage}" for stage in ("embeddings", "context", "lm_head"))


@pytest.fixture(scope="session")
def split_bundle(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "b"
    write_graphs(tiny_r1, folder, "cpu-split", recipe_for("cpu-split"))
    shutil.copy(tiny_r1 / "tokenizer.json", folder)
    return folder


def _set(path: str, **values: object) -> Edit:
    return lambda config: setting_at(config, path).update(values)


def _drop(path: str, *keys: str) -> Edit:
    return lambda config: [setting_at(config, path).pop(key) for key in keys]


def _reorder(*stages: str) -> Edit:
    return lambda config: setting_at(config, DECODER).update(
        pipeline=[{stage: setting_at(config, f"{DECODER}.pipeline.0.{stage}") for stage in stages}]
    )


def _edited(bundle: Path, folder: Path, change: Edit) -> list[str]:
    path = copy_without_weights(bundle, folder) / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config), encoding="utf-8")
    return lint_bundle(folder)


def _is_each(problems: list[str], expected: list[str]) -> bool:
    return len(problems) == len(expected) and all(words in line for line, words in zip(problems, expected, strict=True))


# An edit, and words of every line it brings, in their order.
CASES: dict[str, tuple[Edit, list[str]]] = {
    "a window that does not divide": (
        _set(SLIDING, window_size=12),
        ["window_size 12 does not divide model.context_length 64", "stage context takes 8 positions and is given 12"],
    ),
    "a window twice the graph's": (
        _set(SLIDING, window_size=16),
        ["stage context takes 8 positions and is given 16 on prompts"],
    ),
    "an iterator on prompts": (
        _set(ITERATOR, run_on_prompt=True),
        ["stage iterator takes 1 positions and is given 8 on prompts"],
    ),
    "a context in decoding": (
        _set(CONTEXT, run_on_token_gen=True),
        ["stage context takes 8 positions and is given 1 in decoding"],
    ),
    "inputs that do not slide": (_set(SLIDING, slide_inputs=False), ["slide_inputs is not true"]),
    "another model type": (_set("model", type="qwen2"), ["model.type is 'qwen2', expected 'decoder-pipeline'"]),
    "an unknown input name": (
        _set(f"{DECODER}.inputs", input_idz="input_ids"),
        ["model.decoder.inputs has 'input_idz'"],
    ),
    "an array for the model": (lambda c: c.update(model=[]), ["model is [], expected an object"]),
    "nothing for a stage": (
        lambda c: c["model"]["decoder"]["pipeline"][0].update(context=None),
        ["model.decoder.pipeline[0].context is None, expected an object"],
    ),
    "nothing for the window": (
        lambda c: c["model"]["decoder"].update(sliding_window=None),
        ["model.decoder.sliding_window is None, expected an object"],
    ),
    "names for stages": (
        lambda c: c["model"]["decoder"].update(pipeline=["embeddings"]),
        ["model.decoder.pipeline[0] is 'embeddings', expected an object"],
    ),
    "a length in words": (_set("search", max_length="64"), ["search.max_length is '64', expected a whole number"]),
    "layers in words": (_set(DECODER, num_hidden_layers="four"), ["num_hidden_layers is 'four', expected a whole"]),
    "a pattern of two": (
        _set(f"{DECODER}.inputs", past_key_names="past_%s_%d"),
        ["past_key_names is 'past_%s_%d', expected a name"],
    ),
    "no pad": (_drop("model", "pad_token_id"), ["model.pad_token_id is None"]),
    "a pad that begins sentences": (_set("model", pad_token_id=767), ["pad_token_id 767 is"]),
    "a window of 1": (_set(SLIDING, window_size=1), ["window_size is 1, expected at least 2"]),
    "a window in words": (_set(SLIDING, window_size="8"), ["window_size is '8', expected a whole number"]),
    "a context of half a window": (
        _set("model", context_length=60),
        [
            "window_size 8 does not divide model.context_length 60",
            "chunk_size is 64, not model.context_length 60",
            "max_length 64 is more than model.context_length 60",
        ],
    ),
    "no context": (
        _drop("model", "context_length"),
        ["chunk_size is 64, not model.context_length None", "context_length is 0, expected a token count"],
    ),
    "a sliding cache": (_set(SLIDING, slide_key_value_cache=True), ["slide_key_value_cache is not false"]),
    "a cache that slides by default": (_drop(SLIDING, "slide_key_value_cache"), ["slide_key_value_cache is not false"]),
    "pads first": (_set(SLIDING, alignment="right"), ["sliding_window.alignment is not left"]),
    "pads first by default": (_drop(SLIDING, "alignment"), ["sliding_window.alignment is not left"]),
    "no windows": (
        _drop(DECODER, "sliding_window"),
        ["window_size is None", "slide_key_value_cache is not false", "alignment is not left"],
    ),
    "no chunk size": (_drop(SEARCH, "chunk_size"), ["search.chunk_size is None, not model.context_length 64"]),
    "chunks of a window": (_set(SEARCH, chunk_size=8), ["search.chunk_size is 8, not model.context_length 64"]),
    "a primary provider": (
        _set(f"{DECODER}.session_options", provider_options=[{"qnn": {}}]),
        ["provider_options is not empty"],
    ),
    "no LM head": (_drop(HEAD, "is_lm_head"), ["0 stages have is_lm_head, expected one"]),
    "two LM heads": (_set(ITERATOR, is_lm_head=True), ["2 stages have is_lm_head, expected one"]),
    "no LM head in decoding": (
        _set(HEAD, run_on_token_gen=False),
        ["run_on_token_gen leaves embeddings and iterator to run"],
    ),
    "no LM head in a prompt": (_set(HEAD, run_on_prompt=False), ["run_on_prompt leaves embeddings and context to run"]),
    "nothing but a head in decoding": (
        lambda c: [_set(stage, run_on_token_gen=False)(c) for stage in (EMBEDDINGS, ITERATOR)],
        ["run_on_token_gen leaves lm_head to run", "stage lm_head takes 'last_hidden_states' in decoding, where no"],
    ),
    "an iterator that never runs": (
        _set(ITERATOR, run_on_token_gen=False),
        ["stage lm_head takes 'last_hidden_states' in decoding, where no"],
    ),
    "embeddings of a prompt alone": (
        _set(EMBEDDINGS, run_on_token_gen=False),
        ["stage iterator takes 'inputs_embeds' in decoding, where no"],
    ),
    "no name of the past's length": (
        _drop(f"{DECODER}.inputs", "past_sequence_length"),
        [
            "inputs.past_sequence_length is None, which no stage takes",
            "stage context takes 'past_seq_len', which no",
            "stage iterator takes 'past_seq_len', which no",
        ],
    ),
    "another name of the total length": (
        _set(f"{DECODER}.inputs", total_sequence_length="total"),
        [
            "inputs.total_sequence_length is 'total', which no stage takes",
            "stage context takes 'total_seq_len'",
            "stage iterator takes 'total_seq_len'",
            "inputs.total_sequence_length names 'total', which the graph",
        ],
    ),
    "lengths exchanged": (
        _set(f"{DECODER}.inputs", past_sequence_length="total_seq_len", total_sequence_length="past_seq_len"),
        [
            f"stage {stage} takes {name} as INT32{found}, onnxruntime-genai gives INT32{given}"
            for name, found, given in (("total_seq_len", [1], [1, 1]), ("past_seq_len", [1, 1], [1]))
            for stage in ("context", "iterator")
        ],
    ),
    "an input too many": (
        lambda c: setting_at(c, f"{CONTEXT}.inputs").append("position_ids"),
        ["stage context lists input 'position_ids', which its graph does not have"],
    ),
    "an output too many": (
        lambda c: setting_at(c, f"{EMBEDDINGS}.outputs").append("mask"),
        ["stage embeddings lists output 'mask', which its graph does not have"],
    ),
    "an input unlisted": (
        lambda c: setting_at(c, f"{ITERATOR}.inputs").remove("past_seq_len"),
        ["stage iterator does not list its graph's input 'past_seq_len'"],
    ),
    "an output unlisted": (
        lambda c: setting_at(c, f"{CONTEXT}.outputs").remove("present.2.value"),
        ["stage context does not list its graph's output 'present.2.value'"],
    ),
    "no list of inputs": (
        _drop(HEAD, "inputs"),
        [
            "stage lm_head does not list its graph's input 'last_hidden_states'",
            "stage lm_head does not list its graph's input 'input_ids'",
        ],
    ),
    "the LM head first": (
        _reorder("lm_head", "embeddings", "context", "iterator"),
        ["stage lm_head takes 'last_hidden_states', which no stage before it and no genai input gives"],
    ),
    "no embeddings": (
        _drop(f"{DECODER}.pipeline.0", "embeddings"),
        [f"stage {stage} takes 'inputs_embeds', which no stage before it" for stage in ("context", "iterator")],
    ),
    "embeddings under another name": (
        _set(EMBEDDINGS, output_names_forwarder={"inputs_embeds": "hidden"}),
        [f"stage {stage} takes 'inputs_embeds', which no stage before it" for stage in ("context", "iterator")],
    ),
    "too few layers": (
        _set(DECODER, num_hidden_layers=3),
        [
            f"stage {stage} takes 'past_key_values.3.{kind}', which no stage before it"
            for stage in ("context", "iterator")
            for kind in ("key", "value")
        ],
    ),
    "too many layers": (
        _set(DECODER, num_hidden_layers=5),
        [
            f"{key} names '{name}', which the graph does not have"
            for key, name in (
                ("inputs.past_key_names", "past_key_values.4.key"),
                ("inputs.past_value_names", "past_key_values.4.value"),
                ("outputs.present_key_names", "present.4.key"),
                ("outputs.present_value_names", "present.4.value"),
            )
        ],
    ),
    "logits of another name": (
        _set(f"{DECODER}.outputs", logits="scores"),
        ["outputs.logits names 'scores', which the graph does not have"],
    ),
    "the pipeline as an object": (
        lambda c: _set(DECODER, pipeline=setting_at(c, f"{DECODER}.pipeline.0"))(c),
        ["model.decoder.pipeline is {'embeddings'"],
    ),
    "a missing file": (
        _set(CONTEXT, filename="context_ctx.onnx"),
        ["stage context's filename 'context_ctx.onnx' names no file of the bundle"],
    ),
    "a file outside": (
        _set(ITERATOR, filename="../b/iterator.onnx"),
        ["stage iterator's filename '../b/iterator.onnx' names no file of the bundle"],
    ),
    "no filename": (_drop(HEAD, "filename"), ["stage lm_head's filename None names no file of the bundle"]),
    "two missing files": (
        lambda c: [_set(stage, filename="none.onnx")(c) for stage in (EMBEDDINGS, HEAD)],
        ["stage embeddings's filename 'none.onnx'", "stage lm_head's filename 'none.onnx'"],
    ),
    "too long": (_set(SEARCH, max_length=65), ["search.max_length 65 is more than model.context_length 64"]),
    "no shared buffer": (_set(SEARCH, past_present_share_buffer=False), ["past_present_share_buffer is not true"]),
    "a buffer unshared by default": (
        _drop(SEARCH, "past_present_share_buffer"),
        ["past_present_share_buffer is not true"],
    ),
    "a misspelt key of a stage": (
        _set(CONTEXT, run_on_promt=False),
        ["model.decoder.pipeline.context has 'run_on_promt', which no version"],
    ),
    "a misspelt key of the windows": (
        _set(SLIDING, window=8),
        ["model.decoder.sliding_window has 'window', which no version is known to read"],
    ),
    "a misspelt key of the root": (lambda c: c.update(serach={}), ["the root has 'serach', which no version"]),
    **{
        f"{key} of {version}": (
            _set(path, **{key: value}),
            [f"{path.replace('.0', '')} has '{key}', which only {version} and later read"],
        )
        for path, key, value, version in (
            ("model", "bor_token_id", 1, "0.15"),
            ("model", "tokenizer_dir", ".", "0.15"),
            (DECODER, "layer_types", [], "0.15"),
            (SEARCH, "blank_penalty", 0.0, "0.15"),
            (SLIDING, "cache_slack", 8, "0.16"),
            (ITERATOR, "inherit_session_options", True, "0.16"),
            (DECODER, "shared_initializers", [], "0.16"),
            ("model", "audio_output", {}, "0.17"),
        )
    },
    "pad is eos": (_set("model", pad_token_id=764), ["pad_token_id 764 is an end of sentence"]),
    "pad is one eos of many": (
        _set("model", pad_token_id=765, eos_token_id=[764, 765]),
        ["pad_token_id 765 is an end of sentence"],
    ),
    "pad is text": (_set("model", pad_token_id=300), ["pad_token_id 300 is a token of text"]),
    "a wrong vocabulary": (_set("model", vocab_size=1000), ["vocab_size is 1000, the graph's logits have 1024"]),
    # The context's cache and the iterator's.
    "a wrong head": (_set(DECODER, head_size=32), ["head_size is 32, the graph's cache has 64"] * 2),
    "wrong kv heads": (_set(DECODER, num_key_value_heads=4), ["num_key_value_heads is 4, the graph's cache has 2"] * 2),
}

CLEAN: dict[str, Edit] = {
    "as it is": lambda c: c,
    "stages in two groups": lambda c: _set(
        DECODER, pipeline=[{name: stage} for name, stage in setting_at(c, f"{DECODER}.pipeline.0").items()]
    )(c),
    "flags written out": _set(CONTEXT, run_on_prompt=True, is_lm_head=False, reset_session_idx=2),
    "the iterator before the context": _reorder("embeddings", "iterator", "context", "lm_head"),
    "a name forwarded to itself": _set(EMBEDDINGS, output_names_forwarder={"inputs_embeds": "inputs_embeds"}),
    "shorter answers": _set(SEARCH, max_length=63),
    "every key of the windows": _set(SLIDING, slide_inputs=True, layers=[0], pad_value=1),
    "many ends of sentence": _set("model", eos_token_id=[764, 765]),
}


@pytest.mark.parametrize("case", CASES)
def test_each_planted_problem_is_named(case: str, split_bundle: Path, tmp_path: Path) -> None:
    change, expected = CASES[case]
    problems = _edited(split_bundle, tmp_path / "b", change)
    assert _is_each(problems, expected), problems


@pytest.mark.parametrize("case", CLEAN)
def test_what_every_version_reads_is_no_problem(case: str, split_bundle: Path, tmp_path: Path) -> None:
    assert _edited(split_bundle, tmp_path / "b", CLEAN[case]) == []


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_clean(target: str, quantized: bool, tiny_r1: Path, tmp_path: Path) -> None:
    write_graphs(tiny_r1, tmp_path / "b", target, recipe_for(target) if quantized else None)
    shutil.copy(tiny_r1 / "tokenizer.json", tmp_path / "b")
    assert lint_bundle(tmp_path / "b") == []


def _value(graph: onnx.GraphProto, name: str) -> onnx.ValueInfoProto:
    return next(value for value in (*graph.input, *graph.output) if value.name == name)


def _typed(name: str, dtype: int) -> GraphEdit:
    return lambda graph: setattr(_value(graph, name).type.tensor_type, "elem_type", dtype)


def _sized(name: str, *dims: int) -> GraphEdit:
    def change(graph: onnx.GraphProto) -> None:
        dtype = _value(graph, name).type.tensor_type.elem_type
        _value(graph, name).CopyFrom(onnx.helper.make_tensor_value_info(name, dtype, dims))

    return change


def _renamed(name: str, new: str) -> GraphEdit:
    def change(graph: onnx.GraphProto) -> None:
        _value(graph, name).name = new
        for node in graph.node:
            node.input[:] = [new if value == name else value for value in node.input]

    return change


GRAPH_CASES: dict[str, tuple[str, GraphEdit, list[str]]] = {
    "a length in int64": (
        "iterator",
        _typed("past_seq_len", TensorProto.INT64),
        ["stage iterator takes past_seq_len as INT64[1, 1], onnxruntime-genai gives INT32[1, 1]"],
    ),
    "a flat length": (
        "context",
        _sized("past_seq_len", 1),
        ["stage context takes past_seq_len as INT32[1], onnxruntime-genai gives INT32[1, 1]"],
    ),
    "a length without dimensions": (
        "context",
        _sized("total_seq_len"),
        ["stage context takes total_seq_len as INT32[], onnxruntime-genai gives INT32[1]"],
    ),
    "a stage of another dtype": (
        "context",
        _typed("inputs_embeds", TensorProto.FLOAT16),
        ["stage context takes inputs_embeds as FLOAT16, a stage before it makes FLOAT"],
    ),
    "embeddings of another dtype": (
        "embeddings",
        _typed("inputs_embeds", TensorProto.FLOAT16),
        [
            f"stage {stage} takes inputs_embeds as FLOAT, a stage before it makes FLOAT16"
            for stage in ("context", "iterator")
        ],
    ),
    "an iterator that makes another dtype": (
        "iterator",
        _typed("last_hidden_states", TensorProto.BFLOAT16),
        ["stage lm_head takes last_hidden_states as FLOAT, a stage before it makes BFLOAT16"],
    ),
    "another cache in one stage": (
        "iterator",
        _sized("past_key_values.0.key", 1, 4, 64, 64),
        ["num_key_value_heads is 2, the graph's cache has 4"],
    ),
    "an input of another name": (
        "lm_head",
        _renamed("last_hidden_states", "rows"),
        [
            "stage lm_head lists input 'last_hidden_states', which its graph does not have",
            "stage lm_head does not list its graph's input 'rows'",
            "stage lm_head takes 'rows', which no stage before it and no genai input gives",
        ],
    ),
}


def _edit_graph(path: Path, change: GraphEdit) -> None:
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    path.unlink()  # a hard link: the other name keeps its bytes
    onnx.save(model, path)


@pytest.mark.parametrize("case", GRAPH_CASES)
def test_each_problem_planted_in_a_graph_is_named(case: str, split_bundle: Path, tmp_path: Path) -> None:
    stage, change, expected = GRAPH_CASES[case]
    folder = copy_without_weights(split_bundle, tmp_path / "b")
    _edit_graph(folder / f"{stage}.onnx", change)
    problems = lint_bundle(folder)
    assert _is_each(problems, expected), problems


def test_a_forwarded_output_feeds_an_input_of_its_new_name(split_bundle: Path, tmp_path: Path) -> None:
    folder = copy_without_weights(split_bundle, tmp_path / "b")
    _edit_graph(folder / "lm_head.onnx", _renamed("last_hidden_states", "rows"))
    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    _set(HEAD, inputs=["rows", "input_ids"])(config)
    for stage in (CONTEXT, ITERATOR):
        _set(stage, output_names_forwarder={"last_hidden_states": "rows"})(config)
    path.write_text(json.dumps(config), encoding="utf-8")
    assert lint_bundle(folder) == []
