"""Profile latent-cache: a cache of the latents themselves, beside transformers and beside a cache of every head."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.genai_tokens import greedy_by_genai
from tests.graphs import export_bundle, recipe_for, write_graphs
from tests.random_models import CASES, make_checkpoint
from toolkit.bundle.lint import lint_bundle
from toolkit.checkpoint.opened import synthetic_checkpoint
from toolkit.errors import RecipeError, UnsupportedError
from toolkit.evaluate.positions import open_positions
from toolkit.pipeline.plan import plan_export
from toolkit.recipe import QuantRule, Recipe, load_recipe
from toolkit.target import TARGETS

IDS = [int(i) for i in np.random.default_rng(3).integers(3, 96, 40)]
# kv_b_proj's one block of 32 has 8 bits, as by the target's own rules.
RULES = (QuantRule("*.kv_b_proj", bits=8), QuantRule("*"))


def _latent(rules: tuple[QuantRule, ...] = RULES) -> Recipe:
    return replace(recipe_for("cpu", rules), profile="latent-cache")


@pytest.mark.parametrize(("case", "layers"), [("deepseek-v3", 3), ("deepseek-v2", 4)])
def test_a_cache_of_latents_computes_what_transformers_does(
    case: str, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, extra = CASES[case]
    model = make_checkpoint(family, {**extra, "num_hidden_layers": layers}, tmp_path)
    with torch.no_grad():
        oracle = model(torch.tensor([IDS])).logits[0].numpy()
    monkeypatch.setitem(TARGETS, "cpu", TARGETS["cpu"].in_profile("latent-cache"))
    write_graphs(tmp_path, tmp_path / "bundle")
    bundle = open_positions(tmp_path / "bundle")
    for prompt in (None, 1, 20):
        assert np.abs(bundle.logits(IDS, prompt) - oracle).max() <= 1e-3
    expected = list(IDS[:9])
    with torch.no_grad():
        while len(expected) < len(IDS) and expected[-1] != 2:
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    path = tmp_path / "bundle" / "genai_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    decoder, search = settings["model"]["decoder"], settings["search"]
    given = [decoder[key] for key in ("num_hidden_layers", "num_key_value_heads", "head_size")]
    assert given == [2, 1, 32 + 16] and search["past_present_share_buffer"] is False
    # A prompt at once, and in pieces.
    for chunk in (search["chunk_size"], 5):
        search["chunk_size"] = chunk
        path.write_text(json.dumps(settings), encoding="utf-8")
        assert greedy_by_genai(tmp_path / "bundle", IDS[:9], len(expected)) == expected


@pytest.mark.parametrize("symmetric", [False, True])
def test_quantized_latents_are_those_of_the_same_weights(symmetric: bool, tmp_path: Path) -> None:
    make_checkpoint(*CASES["deepseek-v3"], tmp_path / "checkpoint")
    checkpoint = synthetic_checkpoint(tmp_path / "checkpoint")
    rules = tuple(replace(rule, symmetric=symmetric) for rule in RULES)
    heads = export_bundle(recipe_for("cpu", rules), checkpoint, tmp_path / "heads")
    latents = export_bundle(_latent(rules), checkpoint, tmp_path / "latents")
    assert (heads / "model.onnx.data").read_bytes() == (latents / "model.onnx.data").read_bytes()
    expected, found = (open_positions(bundle, exact=True).logits(IDS) for bundle in (heads, latents))
    assert np.abs(found - expected).max() <= 1e-3 < np.abs(expected).max()
    assert lint_bundle(latents) == []


def test_the_plan_knows_the_smaller_cache(tmp_path: Path) -> None:
    """V2-Lite: 27 layers of 576 numbers in 14 pairs, where every head's key and value are 6,144 a layer."""
    recipe = load_recipe("deepseek-v2-lite-cpu")
    facts = recipe.facts()
    assert facts is not None
    checkpoint = synthetic_checkpoint(facts)
    latents = plan_export(replace(recipe, profile="latent-cache"), checkpoint, tmp_path / "bundle", "int4")
    assert latents.kv_cache_bytes == recipe.context_length * 4 * 28 * 576
    heads = plan_export(recipe, checkpoint, tmp_path / "bundle", "int4")
    assert heads.kv_cache_bytes == recipe.context_length * 4 * 27 * 16 * 2 * 192
    assert latents.layout == heads.layout
    assert {load_recipe(f"deepseek-{name}-cpu").profile for name in ("v3", "r1")} == {"latent-cache"}


REFUSED = {
    "no latents": ("qwen3", (), UnsupportedError, "qwen3 makes no latents that a cache could"),
    "an odd block": ("deepseek-v3", ("quantize.0.bits=4",), UnsupportedError, "kv_b_proj in 4 bits and blocks of 32"),
    "another profile": ("qwen3", ("profile=latents",), RecipeError, "target cpu has none or latent-cache"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_such_cache_is_refused_in_the_plan(case: str, tmp_path: Path) -> None:
    model, changes, error, words = REFUSED[case]
    make_checkpoint(*CASES[model], tmp_path / "checkpoint")
    checkpoint, wanted = synthetic_checkpoint(tmp_path / "checkpoint"), ("profile=latent-cache", "context_length=64")
    with pytest.raises(error, match=words):
        recipe = load_recipe("cpu", ("quality=fast", *wanted, *changes), checkpoint="someone/model")
        plan_export(recipe, checkpoint, tmp_path / "bundle", "int4")
