"""The transformer in parts: how many, where they are cut, and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.exports import IN_TWO_PARTS, Exports
from tests.graphs import EIGHT_BITS, export_bundle
from tests.pipeline_config import ITERATOR, copy_without_weights, setting_at
from toolkit.bundle.lint import lint_bundle
from toolkit.checkpoint.opened import open_checkpoint, synthetic_checkpoint
from toolkit.errors import RecipeError, UnsupportedError
from toolkit.partition import parts as planning
from toolkit.partition.parts import MAX_BINARY_BYTES, compile_memory_bytes, cut_layers, layer_bytes, plan_parts
from toolkit.pipeline.plan import plan_export
from toolkit.recipe import load_recipe, recipe_names

MIB = 1 << 20


@pytest.mark.parametrize(("layers", "parts"), [(28, 1), (28, 2), (28, 3), (28, 28), (7, 6), (48, 13)])
def test_equal_layers_are_cut_evenly(layers: int, parts: int) -> None:
    cuts = cut_layers([5] * layers, parts)
    assert [i for span in cuts for i in span] == list(range(layers)) and len(cuts) == parts
    assert max(map(len, cuts)) - min(map(len, cuts)) <= 1


def test_unequal_layers_are_cut_by_bytes() -> None:
    assert cut_layers([8, 1, 1, 1, 1, 1, 1, 1, 1], 2) == (range(1), range(1, 9))
    # One layer heavier than all others together still leaves every part a layer.
    assert cut_layers([1, 1, 100, 1], 4) == (range(1), range(1, 2), range(2, 3), range(3, 4))
    assert cut_layers([100, 1, 1], 3) == (range(1), range(1, 2), range(2, 3))


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.endswith("-qnn")])
def test_every_part_of_a_recipe_compiles_within_size_and_memory(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    facts = recipe.facts()
    assert facts is not None
    plan = plan_export(recipe, synthetic_checkpoint(facts), tmp_path / name, "int4")
    layers, count = layer_bytes(plan.layout, plan.checkpoint.config.num_hidden_layers), plan.recipe.parts
    # Scales and zero points of the file do not count: 1.25 of 5.25 bits in blocks of 16, a quarter of that in 64. k and
    # v have 8 bits, and a scale a row.
    config = plan.checkpoint.config
    heads, wide = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    wider = 2 * wide / (2 * heads + 2 * wide + 3 * config.intermediate_size)
    share = (4 + 4 * wider) / (5.25 + 2.75 * wider) if name != "tiny-r1-qnn" else 4 / 4.3125
    assert sum(layers) / plan.layout.files["transformer.onnx.data"] == pytest.approx(share, rel=0.01)

    def largest(count: int) -> int:
        return max(sum(layers[i] for i in span) for span in cut_layers(layers, count))

    assert largest(count) * 1.14 < 2 << 30 and compile_memory_bytes(largest(count)) <= 8e9
    assert count == 1 or compile_memory_bytes(largest(count - 1)) > 8e9
    # What was compiled (LOG.md) keeps the cuts it was compiled with.
    assert count == {"tiny-r1-qnn": 1, "1.5b-qnn": 2, "7b-qnn": 7, "8b-qnn": 7, "14b-qnn": 12}.get(name, count)


def test_a_layer_over_the_memory_budget_is_a_part_of_its_own() -> None:
    assert plan_parts([100 * MIB, 900 * MIB, 100 * MIB]) == 3


def test_a_layer_over_the_limit_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"layer 1 has 1\.90 GiB of weights.*may have 2 GiB: quantize it"):
        plan_parts([MIB, int(1.9 * (1 << 30)), MIB])
    assert int(1.6 * (1 << 30)) * 1.14 < MAX_BINARY_BYTES and plan_parts([int(1.6 * (1 << 30))]) == 1


def test_parts_that_cannot_be_are_refused_before_anything_is_written(
    tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    with pytest.raises(UnsupportedError, match="parts is 5, and the model has 4 layers"):
        export_bundle(load_recipe("tiny-r1-qnn", ["parts=5", *EIGHT_BITS]), checkpoint, tmp_path / "b")
    monkeypatch.setattr(planning, "MAX_BINARY_BYTES", 2 * MIB)
    with pytest.raises(UnsupportedError, match=r"parts=1 leaves a part of .* GiB.*: set\s+parts=2, or leave parts out"):
        export_bundle(load_recipe("tiny-r1-qnn", ["parts=1", *EIGHT_BITS]), checkpoint, tmp_path / "b")
    monkeypatch.setattr(planning, "MAX_BINARY_BYTES", MIB // 2)
    with pytest.raises(UnsupportedError, match="layer 0 has"):
        export_bundle(load_recipe("tiny-r1-qnn", EIGHT_BITS), checkpoint, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "change", "words"),
    [
        ("qnn", "soc=x-elit", r"soc 'x-elit' is unknown \(did you mean 'x-elite'\?\), expected x-elite or x2-elite"),
        ("qnn", "soc=8-gen-3", "soc '8-gen-3' is unknown, expected"),
        ("qnn", "soc=60", "soc is 60, and target qnn needs one of x-elite, x2-elite"),
        ("qnn", "soc=", "soc is None, and target qnn needs one of"),
        ("cpu-split", "soc=x-elite", "soc is 'x-elite', and target cpu-split is not compiled for one"),
        ("qnn", "parts=-1", "parts is -1, expected a count"),
        ("qnn", "parts=two", "parts is 'two', expected a count"),
        ("cpu", "parts=2", "parts is 2, and target cpu has no transformer stage to split"),
    ],
)
def test_a_soc_or_parts_that_cannot_be_are_refused(target: str, change: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(f"tiny-r1-{target}", [change])


def test_a_part_that_does_not_run_in_decoding_is_named(exports: Exports, tmp_path: Path) -> None:
    bundle = exports("qnn", IN_TWO_PARTS)
    assert lint_bundle(bundle) == []
    path = copy_without_weights(bundle, tmp_path / "edited") / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    setting_at(config, ITERATOR.replace("iterator", "iterator_1")).update(run_on_token_gen=False)
    path.write_text(json.dumps(config), encoding="utf-8")
    assert any("past_key_values.2.key goes through no stages in decoding" in line for line in lint_bundle(path.parent))
