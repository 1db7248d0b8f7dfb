"""Every recipe in the tree loads, fits its schema and decides each tensor of its true shapes; downloads fail well."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import toolkit
from toolkit import names
from toolkit.bundle.operators import placement_of
from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.download import resolve_checkpoint
from toolkit.checkpoint.opened import synthetic_checkpoint
from toolkit.checkpoint.weights import expected_tensors
from toolkit.errors import CheckpointError, RecipeError
from toolkit.graph.interface import interface_of
from toolkit.partition.lower import lower
from toolkit.pipeline.described import describe
from toolkit.pipeline.plan import plan_export
from toolkit.recipe import (
    BITS,
    BLOCK_SIZES,
    REQUIRED_KEYS,
    RULE_ALGORITHMS,
    QuantRule,
    Recipe,
    load_recipe,
    meant_recipe,
    parse_recipe,
    recipe_names,
)
from toolkit.target import TARGETS

RECIPES = Path(__file__).parent.parent / "recipes"
# Parameters as the model cards round them.
PARAMETERS = {
    "1.5b": 1.78e9,
    "7b": 7.62e9,
    "14b": 14.8e9,
    "32b": 32.8e9,
    "8b": 8.03e9,
    "70b": 70.6e9,
    "0528-8b": 8.19e9,
    "qwen3-4b-thinking-2507": 4.02e9,
    "qwen3-8b": 8.19e9,
    "qwen3-30b-a3b": 30.5e9,
    "gpt-oss-20b": 20.9e9,
    "deepseek-v2-lite": 15.7e9,
    "deepseek-v3": 671e9,
    "deepseek-r1": 671e9,
    "phi-4-mini-reasoning": 3.84e9,
    "gemma-3-1b": 1.00e9,
    "gemma-3-4b": 3.88e9,  # without what sees
    "tiny-r1": 3.67e6,
    "tiny-v3": 1.92e6,
}


# Experts have an operator on the CPU alone, and stages are for what might fit a machine that has an NPU.
TARGETS_OF = {
    "qwen3-30b-a3b": ("cpu", "cpu-split"),
    "gpt-oss-20b": ("cpu", "cpu-split"),
    "deepseek-v2-lite": ("cpu", "cpu-split"),
    "deepseek-v3": ("cpu",),
    "deepseek-r1": ("cpu",),
    "tiny-v3": ("cpu",),
    # The other targets have no operator for its window where the context is longer.
    "gemma-3-1b": ("cpu", "cpu-split", "openvino", "webgpu"),
    "gemma-3-4b": ("cpu", "cpu-split", "openvino", "webgpu"),
}


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_plans_every_tensor_of_its_model_once(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    facts = recipe.facts()
    assert recipe.name == name and facts is not None
    config = read_config(facts)
    plan = plan_export(recipe, synthetic_checkpoint(facts), tmp_path / name, "int4")
    layout, said = plan.layout, describe(plan)
    # What `--dry-run` prints.
    assert (said.recipe, said.layers, said.weights) == (name, config.num_hidden_layers, layout.weights())
    assert (said.outside is not None) == (recipe.target == "vitisai" and "Qwen3" in recipe.model)
    sources = [source for unit in layout.units.values() for source in unit.sources]
    assert sorted(sources) == sorted(expected_tensors(config))
    for file, nbytes in layout.files.items():
        slots = sorted((s.offset, s.offset + s.nbytes) for u in layout.in_file(file) for s in u.slots)
        assert all(a[1] <= b[0] for a, b in pairwise(slots)) and slots[-1][1] == nbytes
    assert layout.weights() == pytest.approx(PARAMETERS[name.removesuffix(f"-{recipe.target}")], rel=0.01)


@cache
def _schema() -> dict[str, Any]:
    return json.loads((RECIPES / "recipe.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_fits_the_schema(name: str) -> None:
    jsonschema.validate(yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8")), _schema())


def test_schema_says_what_the_code_takes() -> None:
    schema = _schema()
    rule = schema["properties"]["quantize"]["items"]
    for kind, part in ((Recipe, schema), (QuantRule, rule)):
        assert part["properties"].keys() == {field.name for field in fields(kind)}
    assert schema["required"] == list(REQUIRED_KEYS)
    assert rule["required"] == [field.name for field in fields(QuantRule) if field.default is MISSING]
    assert schema["properties"]["target"]["enum"] == list(TARGETS)
    assert sorted(rule["properties"]["algorithm"]["enum"]) == sorted(RULE_ALGORITHMS)
    assert rule["properties"]["bits"]["enum"] == list(BITS)
    assert rule["properties"]["block_size"]["enum"] == [*BLOCK_SIZES, "auto"]


def test_hub_id_that_is_not_cached_is_refused_offline() -> None:
    with pytest.raises(CheckpointError, match=r"could not be downloaded.*--checkpoint"):
        resolve_checkpoint("nobody/no-such-model")


def test_word_that_is_no_place_is_refused() -> None:
    with pytest.raises(CheckpointError, match="neither a folder, a GGUF file nor a hub id"):
        resolve_checkpoint("no-such-folder")


@pytest.mark.parametrize("name", recipe_names())
def test_every_node_of_a_recipes_graphs_is_legal_for_its_provider(name: str, tmp_path: Path) -> None:
    """Two layers of the true width: the others have the same nodes."""
    loaded = load_recipe(name)
    facts = loaded.facts()
    assert facts is not None
    shape = json.loads((facts / "config.json").read_text(encoding="utf-8"))
    shape.get("text_config", shape)["num_hidden_layers"] = 2
    _write(tmp_path / "config.json", json.dumps(shape))
    recipe = replace(loaded, name=f"two-layers-of-{name}")
    plan = plan_export(recipe, synthetic_checkpoint(tmp_path), tmp_path / name, "int4")
    for graph in lower(plan.checkpoint.config, plan.layout, plan.target, recipe, pad_token_id=0):
        placement = placement_of(interface_of(graph.model), graph.stage)
        transformer = graph.stage.name not in (names.EMBEDDINGS, names.HEAD)
        # Two Reshape around each of the two norms over heads, where the plan says that they stay on the CPU.
        outside = 4 * 2 if describe(plan).outside and transformer else 0
        assert bool(placement.problems) == (outside > 0)
        assert placement.nodes_legal + placement.nodes_outside + outside == placement.nodes


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_recipe_does_not_say_is_its_targets(target: str, tmp_path: Path) -> None:
    short = load_recipe(str(_write(tmp_path / "r.yaml", f"name: r\nmodel: m\ntarget: {target}\n")))
    bare = load_recipe(target, checkpoint="m")
    assert replace(bare, name="r") == short and short.quality == "balanced"
    row = TARGETS[target]
    assert (short.context_length, short.window, short.soc) == (row.context_length, row.window, row.soc)
    assert [asdict(rule) | dict(given) for rule, given in zip(short.quantize, row.quantize, strict=True)] == [
        asdict(rule) for rule in short.quantize
    ]


@pytest.mark.parametrize("target", ["cpu", "cpu-split"])
def test_the_best_quality_has_narrower_blocks_and_what_is_asked_for_goes_before(target: str) -> None:
    def rules(*changes: str) -> list[tuple[str, int | str]]:
        return [(rule.match, rule.block_size) for rule in load_recipe(f"1.5b-{target}", changes).quantize]

    keys, less = "*.k_proj|*.v_proj|*.kv_a_proj_with_mqa|*.kv_b_proj", "model.embed_tokens|*.gate_proj|*.up_proj"
    by_size = [(keys, "auto"), ("model.embed_tokens|*.experts.*", 32), ("*", "auto")]
    assert rules() == rules("quality=fast") == by_size
    assert rules("quality=best") == [(keys, 32), (less, 32), ("*", 16)]
    assert rules("quantize.1.block_size=128", "quality=best") == [(keys, 32), (less, 128), ("*", 16)]


@pytest.mark.parametrize("target", TARGETS)
def test_k_and_v_have_8_bits_where_a_provider_takes_them(target: str) -> None:
    """But not where q is packed with them."""
    (plan,) = toolkit.plan(f"1.5b-{target}", synthetic=True)
    specs = {name: unit.spec for name, unit in plan.layout.units.items() if unit.spec}
    found = {spec.bits for name, spec in specs.items() if name.endswith(("k_proj.weight", "v_proj.weight"))}
    assert found == {4 if target in ("vitisai", "webgpu") else 8}
    assert {spec.bits for name, spec in specs.items() if name.endswith(("q_proj.weight", "o_proj.weight"))} == {4}


def test_a_manifests_recipe_comes_back_as_it_was() -> None:
    recipe = load_recipe("tiny-r1-qnn", ["rotate=true"])
    assert parse_recipe(json.loads(json.dumps(asdict(recipe))), "manifest") == recipe
    assert parse_recipe({"name": "a", "model": "m", "target": "qnn"}, "manifest").window == TARGETS["qnn"].window


def test_changes_reach_what_the_target_says() -> None:
    recipe = load_recipe("14b-cpu", ["quantize.0.bits=4", "validate.accuracy_drop=0.1"])
    assert recipe.quantize[0].bits == 4 and recipe.quantize[0].block_size == TARGETS["cpu"].quantize[0]["block_size"]
    assert recipe.validate == {"mean_kld": "auto", "accuracy_drop": 0.1}
    assert load_recipe("14b-cpu").validate == {"mean_kld": "auto"}  # the row itself was not changed
    moved = load_recipe("14b-cpu", ["window=32", "target=qnn"])
    assert moved.window == 32 and moved.quantize == load_recipe("14b-qnn").quantize


def test_a_recipes_paths_are_relative_to_it_and_a_changes_to_the_folder_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "name: mine-cpu\nmodel: ../weights\ntarget: cpu\ncalibration: texts/own.jsonl\n"
    path = _write(tmp_path / "recipes" / "mine.yaml", text)
    (tmp_path / "weights").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for name in (str(path), str(Path("..") / "recipes" / "mine.yaml")):
        recipe = load_recipe(name)
        assert Path(recipe.model) == tmp_path / "weights"
        assert Path(recipe.calibration) == tmp_path / "recipes" / "texts" / "own.jsonl"
    assert load_recipe(str(path), ["calibration=own.txt"]).calibration == "own.txt"
    assert load_recipe(str(path), ["calibration=questions"]).calibration == "questions"
    (tmp_path / "weights").rmdir()
    with pytest.raises(RecipeError, match=r"model \.\./weights would be .*weights, which does not exist"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("word", "checkpoint", "meant"),
    [
        ("cpu", "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", "14b-cpu"),
        ("cpu-split", "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", "14b-cpu-split"),
        ("qnn", "deepseek-ai/deepseek-r1-distill-llama-8b", "8b-qnn"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", None, "1.5b-cpu"),
        ("cpu", "someone/a-fine-tune", "cpu"),
        ("14b-qnn", "someone/a-fine-tune", "14b-qnn"),
        ("tiny-r1", None, "tiny-r1"),
    ],
)
def test_a_hub_id_means_its_recipe(word: str, checkpoint: str | None, meant: str) -> None:
    assert meant_recipe(word, checkpoint) == meant


def test_a_model_without_a_target_is_told_its_targets() -> None:
    with pytest.raises(RecipeError, match="name its target too: tiny-r1-cpu, tiny-r1-cpu-split, tiny-r1-dml"):
        load_recipe("tiny-r1")
    with pytest.raises(RecipeError, match="did you mean '14b-cpu'"):
        load_recipe("14b-cpuu")
    with pytest.raises(RecipeError, match="export cpu --checkpoint someone/a-fine-tune"):
        load_recipe("someone/a-fine-tune")


def test_every_distill_has_a_recipe_for_every_target() -> None:
    assert recipe_names() == sorted(
        f"{model}-{target}" for model in PARAMETERS for target in TARGETS_OF.get(model, TARGETS)
    )


@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.startswith("tiny-r1")])
def test_a_recipe_says_only_what_differs(name: str) -> None:
    raw = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    defaults = asdict(load_recipe(raw["target"], checkpoint="m"))
    assert {key: value for key, value in raw.items() if key in defaults and defaults[key] == value} == {
        "target": raw["target"]
    }
