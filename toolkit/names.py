"""The vocabulary: checkpoint tensor names, their roles, stage and bundle file names.

No tensor or file name is formatted anywhere else, so a name can be searched for and is spelled once.
"""

from __future__ import annotations

import re
from typing import Final

EMBED_TOKENS: Final = "model.embed_tokens"
FINAL_NORM: Final = "model.norm"
LM_HEAD: Final = "lm_head"

# Roles the CPU execution provider serves on every target.
OUTSIDE_ROLES: Final = ("embed_tokens", "lm_head")
# Where their nodes are named, and the `layer_ann` ONNX Runtime knows them by inside one graph.
OUTSIDE_PATHS: Final = ("/model/embed_tokens/", "/lm_head/")
OUTSIDE_ANNOTATION: Final = "embeddings_and_lm_head"
# Where one graph computes GroupQueryAttention's lengths from the mask.
LENGTHS_PATH: Final = "/model/lengths"
# Where hidden states are cut down to each row's last position, and the two nodes that who judges every position goes
# around.
LAST_POSITION_PATH: Final = "/model/last_position"
LAST_POSITION_GATHER: Final = f"{LAST_POSITION_PATH}/GatherND"
LAST_POSITION_UNSQUEEZE: Final = f"{LAST_POSITION_PATH}/Unsqueeze"
# Where it is computed of which positions beside the last one a graph gives logits, and how many before it.
LAST_ROWS_PATH: Final = f"{LENGTHS_PATH}/last_rows"
LAST_ROWS_BEFORE: Final = f"{LAST_ROWS_PATH}/before"

# How a graph is written that torch's exporter made of transformers' own code.
TRACED: Final = "traced, unfused"

# Stages, and the graph file of each. Context and iterator share the transformer's data file.
MODEL: Final = "model"
EMBEDDINGS: Final = "embeddings"
CONTEXT: Final = "context"
ITERATOR: Final = "iterator"
HEAD: Final = "lm_head"
MODEL_DATA_FILE: Final = "model.onnx.data"
EMBEDDINGS_DATA_FILE: Final = "embeddings.onnx.data"
TRANSFORMER_DATA_FILE: Final = "transformer.onnx.data"
HEAD_DATA_FILE: Final = "lm_head.onnx.data"
GENAI_CONFIG_FILE: Final = "genai_config.json"
MANIFEST_FILE: Final = "manifest.json"
COMPILE_LOG_FILE: Final = "compile.log"
# What an export was asked for: it marks a work folder as ours, and leaves the bundle last.
REQUEST_FILE: Final = "request.json"
REPORT_FILE: Final = "report.json"
REPORT_PAGE_FILE: Final = "report.html"
README_FILE: Final = "README.md"
CONFIG_FILE: Final = "config.json"
SAFETENSORS_FILE: Final = "model.safetensors"
SAFETENSORS_INDEX_FILE: Final = "model.safetensors.index.json"
TOKENIZER_FILE: Final = "tokenizer.json"

INPUT_IDS: Final = "input_ids"
ATTENTION_MASK: Final = "attention_mask"
POSITION_IDS: Final = "position_ids"
LOGITS: Final = "logits"
# The one node of a compiled stage.
EP_CONTEXT: Final = "com.microsoft:EPContext"
# Between stages, and the lengths onnxruntime-genai gives a pipeline.
EMBEDDED: Final = "inputs_embeds"
LAST_HIDDEN: Final = "last_hidden_states"
# What a head that predicts one more token (MTP) takes of its model, and gives for a further one.
HIDDEN_STATES: Final = "hidden_states"
HIDDEN_STATES_OUT: Final = "hidden_states_out"
PAST_SEQ_LEN: Final = "past_seq_len"
TOTAL_SEQ_LEN: Final = "total_seq_len"
# Before a layer's index: its cache on the way into a graph and out of it.
_PAST: Final = "past_key_values."
_PRESENT: Final = "present."
# Behind a layer's index: what its convolution and its linear attention remember.
_STATES: Final = (".conv", ".recurrent")
# Before the name of a draft's file.
_DRAFT: Final = "draft."


def stage_file(stage: str) -> str:
    """Returns the name of a stage's graph file."""
    return f"{stage}.onnx"


def compiled_file(stage: str) -> str:
    """Returns the EPContext file of a stage that was compiled ahead of time."""
    return f"{stage}_ctx.onnx"


def is_compilers(file: str) -> bool:
    """Whether a bundle's file is a compiler's, made ahead of time from the graphs beside it."""
    return file.endswith((compiled_file(""), ".bin"))


def draft_file(name: str) -> str:
    """Returns the name that a file of the bundle of what guesses has in the bundle of the model that checks it."""
    return f"{_DRAFT}{name}"


def is_draft(name: str) -> bool:
    """Whether a bundle's file is of the smaller model, or the head, that guesses for it."""
    return name.startswith(_DRAFT)


def part_stage(stage: str, part: int, parts: int) -> str:
    """Returns a transformer stage's name: `context`, or `context_3` where there are several parts of it."""
    return stage if parts == 1 else f"{stage}_{part}"


def stage_kind(stage: str) -> str:
    """Returns what a stage does, such as `context` of `context_3`."""
    return re.sub(r"_\d+$", "", stage)


def part_input(part: int) -> str:
    """Returns the hidden states that one part of the transformer hands to the next, numbered by its taker."""
    return EMBEDDED if part == 0 else f"hidden_states_{part}"


def part_output(part: int, parts: int) -> str:
    """Returns the hidden states that a part of the transformer makes: the last part's are normalized, for the LM
    head."""
    return LAST_HIDDEN if part == parts - 1 else part_input(part + 1)


def layer_module(layer_index: int, module: str) -> str:
    """Returns the checkpoint's name of a module of one layer: `model.layers.3.` + `mlp.down_proj`."""
    return f"model.layers.{layer_index}.{module}"


def weight(module: str) -> str:
    """Returns the tensor name of a module's weight."""
    return f"{module}.weight"


def bias(module: str) -> str:
    """Returns the tensor name of a module's bias."""
    return f"{module}.bias"


def input_of(module: str) -> str:
    """Returns the activations that a module reads, as a point whose range is known."""
    return f"{module}.input"


def output_of(module: str) -> str:
    """Returns the activations that a module makes, a linear's before its bias."""
    return f"{module}.output"


def role_of(name: str) -> str:
    """Returns what a tensor or module is for: `q_proj`, `embed_tokens`, `lm_head`, `input_layernorm`, …"""
    return name.removesuffix(".weight").removesuffix(".bias").rsplit(".", 1)[-1]


def is_expert(name: str) -> bool:
    """Returns whether a tensor or module is one of a router's experts: `model.layers.3.mlp.experts.7.up_proj`."""
    return ".experts." in name


def layer_of(name: str) -> int | None:
    """Returns the layer a tensor or module belongs to, None outside the layers."""
    parts = name.split(".")
    return int(parts[2]) if name.startswith("model.layers.") else None


def past_key(layer_index: int | str) -> str:
    """Returns the graph input that carries one layer's keys; `%d` gives onnxruntime-genai's pattern."""
    return f"{_PAST}{layer_index}.key"


def past_value(layer_index: int | str) -> str:
    """Returns the graph input that carries one layer's values."""
    return f"{_PAST}{layer_index}.value"


def present_key(layer_index: int | str) -> str:
    """Returns the graph output that returns one layer's keys."""
    return f"{_PRESENT}{layer_index}.key"


def present_value(layer_index: int | str) -> str:
    """Returns the graph output that returns one layer's values."""
    return f"{_PRESENT}{layer_index}.value"


def past_conv(layer_index: int | str) -> str:
    """Returns the graph input that carries the last inputs of a layer's convolution."""
    return f"{_PAST}{layer_index}{_STATES[0]}"


def past_recurrent(layer_index: int | str) -> str:
    """Returns the graph input that carries the state of a layer's linear attention."""
    return f"{_PAST}{layer_index}{_STATES[1]}"


def is_state(name: str) -> bool:
    """Returns whether a graph's input or output carries what stands for a text whatever its length."""
    return name.endswith(_STATES)


def is_past(name: str) -> bool:
    """Returns whether a graph input carries the cache of some layer."""
    return name.startswith(_PAST)


def is_present(name: str) -> bool:
    """Returns whether a graph output returns the cache of some layer."""
    return name.startswith(_PRESENT)


def present_of(past: str) -> str:
    """Returns the graph output that returns what a graph input carried: `present.3.key` of `past_key_values.3.key`."""
    return _PRESENT + past.removeprefix(_PAST)
