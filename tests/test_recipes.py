"""Every recipe in the tree loads and decides each tensor; downloads fail with one clear line."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.download import resolve_checkpoint
from toolkit.checkpoint.weights import expected_tensors
from toolkit.errors import CheckpointError
from toolkit.graph.layout import plan_layout
from toolkit.recipe import load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_plans_every_tensor_once(name: str, tiny_r1: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    config = replace(read_config(tiny_r1), num_hidden_layers=2, sliding_windows=(None, None))
    layout = plan_layout(config, recipe)
    sources = [source for unit in layout.units.values() for source in unit.sources]
    assert sorted(sources) == sorted(expected_tensors(config))
    slots = sorted((s.offset, s.offset + s.nbytes) for u in layout.units.values() for s in u.slots)
    assert all(a[1] <= b[0] for a, b in pairwise(slots)) and slots[-1][1] == layout.nbytes


def test_hub_id_that_is_not_cached_is_refused_offline() -> None:
    with pytest.raises(CheckpointError, match=r"could not be downloaded.*--checkpoint"):
        resolve_checkpoint("nobody/no-such-model")


def test_word_that_is_no_place_is_refused() -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        resolve_checkpoint("no-such-folder")
