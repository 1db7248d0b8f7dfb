"""Each family against transformers' own classes: what a config.json means, which tensors and layers there are; and the
registry, and onnxruntime-genai's names for families."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime_genai as og
import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from tests.conftest import ROOT
from tests.graphs import write_graphs
from tests.random_models import CASES
from toolkit.bundle.genai_config import GENAI_TYPES
from toolkit.checkpoint import families
from toolkit.checkpoint.anatomy import decoder_of, stored_tensors
from toolkit.checkpoint.config import parse_config
from toolkit.checkpoint.families import FAMILIES
from toolkit.checkpoint.family import DECODER
from toolkit.checkpoint.opened import synthetic_checkpoint
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.graph.attention import turns
from toolkit.pipeline.plan import plan_export
from toolkit.recipe import load_recipe

# What no family has a default for.
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "full_attention"]
# What transformers' classes leave to the file, too.
OF_ITS_OWN: dict[str, dict[str, Any]] = {"deepseek_v2": {"num_experts_per_tok": 6}}
# Fewer experts than by default, where what a case changes is not they.
FEWER: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 16},
    "deepseek_v2": {"n_routed_experts": 16},
    "deepseek_v3": {"n_routed_experts": 16},
}
CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "windows": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "windows by layer": {"use_sliding_window": True, "sliding_window": 5, "layer_types": KINDS},
    "windows switched off": {"use_sliding_window": False, "sliding_window": 5, "layer_types": KINDS},
    "a null window": {"sliding_window": None},
    "no RoPE in every second layer": {"no_rope_layer_interval": 2},
    "no RoPE in two layers": {"no_rope_layers": [1, 0, 1, 1, 0, 0]},
    "windows where there is no RoPE": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "no_rope_layers": [1, 0, 1, 1, 0],
    },
    "heads of 32": {"head_dim": 32},
    "tied": {"tie_word_embeddings": True},
    "not tied": {"tie_word_embeddings": False},
}


# A decoder inside another model is compared in test_gemma3.py, one that transformers 4 has not in
# test_linear_attention.py.
WHOLE = [name for name, family in FAMILIES.items() if not family.text_config and name in CONFIG_MAPPING]


@pytest.mark.parametrize("model_type", WHOLE)
@pytest.mark.parametrize("case", CHANGES)
def test_a_config_means_what_it_means_to_transformers(case: str, model_type: str) -> None:
    changes = OF_ITS_OWN.get(model_type, {}) | CHANGES[case]
    if case != "nothing":
        changes |= FEWER.get(model_type, {})
    if model_type == "deepseek_v2":
        changes.pop("mlp_bias", None)  # refused
    if model_type == "gemma3_text" and case == "a null window":
        changes = {}  # refused
    if model_type in ("llama", "mistral", "phi3"):
        # Their classes take any key and keep it, but have no such list to check it against.
        changes.pop("layer_types", None)
    theirs = transformers.AutoConfig.for_model(model_type, **SHAPE, **changes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    ours = parse_config({"model_type": model_type, **SHAPE, **changes}, Path("config.json"))
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert (ours.rms_norm_eps, ours.rope.rope_theta) == (theirs.rms_norm_eps, theirs.rope_theta)
    tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if theirs.tie_word_embeddings:
        del tensors["lm_head.weight"]
    assert stored_tensors(decoder_of(ours)) == tensors
    for layer, module in zip(decoder_of(ours).layers, model.model.layers, strict=True):
        attention = module.self_attn
        # Mistral's and Phi3's attention asks its config; Llama keeps the key and knows no windows.
        window = (
            theirs.sliding_window if model_type in ("mistral", "phi3") else getattr(attention, "sliding_window", None)
        )
        assert layer.attention.window == window
        assert turns(layer) == bool(getattr(attention, "use_rope", True))


def test_every_file_of_the_folder_is_a_family_under_its_own_name() -> None:
    folder = Path(families.__file__).parent
    assert sorted(FAMILIES) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    assert {name: family.model_type for name, family in FAMILIES.items()} == {name: name for name in FAMILIES}


def test_every_family_is_compared_with_transformers_on_random_weights() -> None:
    assert {getattr(transformers, f"{family}Config").model_type for family, _ in CASES.values()} == set(WHOLE)


def test_an_unknown_family_is_refused_with_the_list_of_those_there_are() -> None:
    with pytest.raises(UnsupportedError, match=r"config.json: model_type 'gpt9'.*expected one of") as refused:
        parse_config({"model_type": "gpt9", **SHAPE}, Path("config.json"))
    assert all(family in str(refused.value) for family in FAMILIES)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama bias": ("llama", {"attention_bias": "yes"}, "attention_bias is 'yes', expected true or false"),
    "mistral window": ("mistral", {"sliding_window": -4}, "sliding_window is -4, expected a positive whole number"),
    "qwen2 first layer": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": -1},
        "max_window_layers is -1, expected a whole number from 0 on",
    ),
    "qwen3 too few kinds": (
        "qwen3",
        {"use_sliding_window": True, "layer_types": KINDS[:3]},
        "expected full_attention or sliding_attention for each of the 5 layers",
    ),
    "smollm3 too few layers": ("smollm3", {"no_rope_layers": [1, 0]}, "expected 0 or 1 for each of the 5 layers"),
    "smollm3 no flags": ("smollm3", {"no_rope_layers": [0, 1, 2, 3, 4]}, "expected 0 or 1 for each of the 5 layers"),
    "smollm3 interval": ("smollm3", {"no_rope_layer_interval": 0}, "expected a positive whole number"),
    "gpt_oss too few kinds": (
        "gpt_oss",
        {"layer_types": KINDS[:3]},
        "expected full_attention or sliding_attention for each of the 5 layers",
    ),
    "gpt_oss more than there are": (
        "gpt_oss",
        {"num_local_experts": 3},
        "num_experts_per_tok is 4, expected at most the 3",
    ),
    "phi3 too few factors": (
        "phi3",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 7, "long_factor": [1.0] * 8}},
        r"rope short_factor is \[1.0, .*expected a list of 8 numbers",
    ),
    "phi3 an odd part": (
        "phi3",
        {"partial_rotary_factor": 0.7},
        "partial_rotary_factor 0.7 turns 11 of the 16 channels",
    ),
    "phi3 more than a head": ("phi3", {"partial_rotary_factor": 1.5}, "turns 24 of the 16 channels"),
    "gemma3_text no window": ("gemma3_text", {"sliding_window": None}, "sliding_window is None, expected a positive"),
    "gemma3_text unknown kind": (
        "gemma3_text",
        {"layer_types": ["full_attention"] * 4 + ["chunked_attention"]},
        "expected full_attention or sliding_attention for each of the 5 layers",
    ),
    "gemma3 no decoder": ("gemma3", {"text_config": 5}, "text_config is 5, expected an object"),
    "qwen3 unknown kind": (
        "qwen3",
        {"use_sliding_window": True, "layer_types": [*KINDS[:4], "linear_attention"]},
        "expected full_attention or sliding_attention for each of the 5 layers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fields_that_mean_nothing_are_refused(case: str) -> None:
    model_type, changes, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        parse_config({"model_type": model_type, **SHAPE, **changes}, Path("config.json"))


def test_onnxruntime_genai_knows_every_type_and_no_other(stories260k: Path, tmp_path: Path) -> None:
    write_graphs(stories260k, tmp_path)
    path = tmp_path / "genai_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name in (*GENAI_TYPES, "seed_oss"):
        settings["model"]["type"] = name
        path.write_text(json.dumps(settings), encoding="utf-8")
        if name == "seed_oss":
            with pytest.raises(Exception, match="Unsupported model_type"):
                og.Model(str(tmp_path))
        else:
            og.Model(str(tmp_path))
    assert DECODER in GENAI_TYPES


def test_a_type_that_does_not_exist_is_refused_before_anything_is_packed(
    tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, recipe = synthetic_checkpoint(tiny_r1), load_recipe("tiny-r1-cpu")
    wrong = replace(FAMILIES[checkpoint.config.model_type], genai_type="qwen9")
    monkeypatch.setattr("toolkit.bundle.genai_config.FAMILIES", {**FAMILIES, wrong.model_type: wrong})
    with pytest.raises(UnsupportedError, match=r"genai_type 'qwen9'.*expected one of.*decoder"):
        plan_export(recipe, checkpoint, tmp_path / "bundle", "int4")
    assert not list(tmp_path.iterdir())


def test_what_the_how_to_page_quotes_stands_in_the_files() -> None:
    page = (ROOT / "docs" / "how-to" / "family.md").read_text(encoding="utf-8")
    quoted = re.findall(r"```python\n(.*?)```", page, re.S)
    files = [Path(families.__file__).with_name("smollm3.py"), ROOT / "tests" / "random_models.py", Path(__file__)]
    texts = [path.read_text(encoding="utf-8") for path in files]
    assert len(quoted) >= 4
    assert [piece for piece in quoted if not any(piece in text for text in texts)] == []


@pytest.mark.parametrize("model_type", WHOLE)
def test_a_config_without_its_length_has_that_of_transformers_class(model_type: str) -> None:
    shape = {key: value for key, value in SHAPE.items() if key != "max_position_embeddings"}
    shape |= OF_ITS_OWN.get(model_type, {})
    ours = parse_config({"model_type": model_type, **shape, "max_position_embeddings": None}, Path("config.json"))
    theirs = transformers.AutoConfig.for_model(model_type, **shape)
    assert ours.max_position_embeddings == theirs.max_position_embeddings


_YARN_OF_ITS_OWN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {**_YARN_OF_ITS_OWN, "original_max_position_embeddings": 16.0}},
        {"rope_scaling": {"rope_type": None, "type": "yarn", "factor": 4, "original_max_position_embeddings": 16}},
        {"rope_scaling": {"type": "yarn", "factor": 4}, "original_max_position_embeddings": 16},
        {"rope_theta": None, "rope_scaling": {**_YARN_OF_ITS_OWN, "rope_theta": None}},
        {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _YARN_OF_ITS_OWN)},
    ],
)
def test_rope_in_every_form_that_files_have(changes: dict[str, Any]) -> None:
    shape = {"model_type": "qwen3", **SHAPE}
    expected = parse_config({**shape, "rope_scaling": _YARN_OF_ITS_OWN}, Path("config.json"))
    assert parse_config({**shape, **changes}, Path("config.json")) == expected


def test_rope_that_differs_by_layers_is_refused() -> None:
    by_kind = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    with pytest.raises(UnsupportedError, match="RoPE differs between kinds of layers"):
        parse_config({"model_type": "qwen3", **SHAPE, "rope_parameters": by_kind}, Path("config.json"))
