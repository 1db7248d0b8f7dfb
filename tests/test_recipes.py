"""Every recipe in the tree loads, fits its schema and decides each tensor of its true shapes; downloads fail well."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from toolkit.bundle.operators import place
from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.download import resolve_checkpoint
from toolkit.checkpoint.opened import synthetic_checkpoint
from toolkit.checkpoint.weights import expected_tensors
from toolkit.errors import CheckpointError
from toolkit.graph.interface import interface_of
from toolkit.graph.layout import plan_layout
from toolkit.partition.lower import lower
from toolkit.pipeline.plan import plan_export
from toolkit.quant import blockwise
from toolkit.recipe import ALGORITHMS, BITS, BLOCK_SIZES, QuantRule, Recipe, load_recipe, recipe_names
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
    "tiny-r1": 3.67e6,
}


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_plans_every_tensor_of_its_model_once(name: str) -> None:
    recipe = load_recipe(name)
    facts = recipe.facts()
    assert recipe.name == name and facts is not None
    config = read_config(facts)
    layout = plan_layout(config, TARGETS[recipe.target].in_profile(recipe.profile), recipe)
    sources = [source for unit in layout.units.values() for source in unit.sources]
    assert sorted(sources) == sorted(expected_tensors(config))
    for file, nbytes in layout.files.items():
        slots = sorted((s.offset, s.offset + s.nbytes) for u in layout.in_file(file) for s in u.slots)
        assert all(a[1] <= b[0] for a, b in pairwise(slots)) and slots[-1][1] == nbytes
    assert layout.weights() == pytest.approx(PARAMETERS[name.removesuffix(f"-{recipe.target}")], rel=0.01)


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
        assert set(part["required"]) == {field.name for field in fields(kind) if field.default is MISSING}
    assert schema["properties"]["target"]["enum"] == list(TARGETS)
    assert rule["properties"]["algorithm"]["enum"] == list(ALGORITHMS) == ["auto", *blockwise.ALGORITHMS]
    assert rule["properties"]["bits"]["enum"] == list(BITS)
    assert rule["properties"]["block_size"]["enum"] == list(BLOCK_SIZES)


def test_hub_id_that_is_not_cached_is_refused_offline() -> None:
    with pytest.raises(CheckpointError, match=r"could not be downloaded.*--checkpoint"):
        resolve_checkpoint("nobody/no-such-model")


def test_word_that_is_no_place_is_refused() -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        resolve_checkpoint("no-such-folder")


@pytest.mark.parametrize("name", recipe_names())
def test_every_node_of_a_recipes_graphs_is_legal_for_its_provider(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    facts = recipe.facts()
    assert facts is not None
    plan = plan_export(recipe, synthetic_checkpoint(facts), tmp_path / name, "int4")
    for graph in lower(plan.checkpoint.config, plan.layout, plan.target, recipe, pad_token_id=0):
        placement = place(interface_of(graph.model), graph.stage)
        assert not placement.problems and placement.nodes_legal + placement.nodes_outside == placement.nodes
