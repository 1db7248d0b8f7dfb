"""manifest.json: what is written comes back as it was, from this toolkit and from older ones."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from toolkit.bundle.manifest import CalibrationText, ChangedFile, Manifest, read_manifest, save_manifest
from toolkit.bundle.stop_tokens import StopToken
from toolkit.checkpoint.weights import Origin
from toolkit.files import FileEntry
from toolkit.recipe import load_recipe, recipe_names


def manifest_of(recipe_name: str) -> Manifest:
    """A manifest with every key."""
    return Manifest(
        schema_version=1,
        versions={"toolkit": "0.1.0"},
        recipe=load_recipe(recipe_name, ["parts=1"]),
        precision="int4",
        synthetic=False,
        checkpoint=(Origin("model.safetensors", 7, "ab"), Origin("synthetic", seed=3)),
        files=(FileEntry("a.onnx", 3, "cd"), FileEntry("b.onnx", 5, "ef")),
        calibration=CalibrationText("calibration.jsonl", "12"),
        compiled={"context": "34"},
        stop_tokens=(StopToken(2, "</s>", ("config.json",)),),
        changed=(ChangedFile("tokenizer_config.json", ("another class",)),),
        side_files=(FileEntry("config.json", 3, "cd"), FileEntry("additional_chat_templates/rag.jinja", 1, "ab")),
    )


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_written_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    written = manifest_of(name)
    save_manifest(tmp_path / "manifest.json", written)
    assert read_manifest(tmp_path) == written


def test_what_is_absent_is_no_null(tmp_path: Path) -> None:
    save_manifest(tmp_path / "manifest.json", manifest_of("tiny-r1-cpu"))
    text = (tmp_path / "manifest.json").read_text(encoding="utf-8")
    assert "null" not in text
    assert json.loads(text)["checkpoint"][1] == {"name": "synthetic", "seed": 3}


@pytest.mark.parametrize(
    ("recipe", "profile"),
    [("tiny-r1-cpu", ""), ("tiny-r1-qnn", "float16"), ("tiny-r1-dml", ""), ("14b-qnn", "float16")],
)
def test_a_bundle_from_before_profiles_and_parts_opens(recipe: str, profile: str, tmp_path: Path) -> None:
    """As those of the first toolkits are: no profile, parts, window, soc, quality, and nulls where nothing was said."""
    now = load_recipe(recipe)
    kept = ("name", "model", "target", "context_length", "quantize", "validate")
    older: dict[str, Any] = {key: value for key, value in asdict(now).items() if key in kept}
    raw = {"schema_version": 1, "recipe": {**older, "rotate": None}, "synthetic": False, "precision": "int4"}
    raw |= {"versions": {}, "checkpoint": [], "files": []}
    (tmp_path / "manifest.json").write_text(json.dumps(raw), encoding="utf-8")
    found = read_manifest(tmp_path).recipe
    assert (found.profile, found.parts, found.window, found.soc) == (profile, 1, now.window, now.soc)


def test_an_entry_takes_the_place_of_the_one_of_its_name() -> None:
    changed = manifest_of("tiny-r1-cpu").with_files([FileEntry("b.onnx", 9, "00"), FileEntry("aa.bin", 1, "11")])
    assert [(entry.name, entry.bytes) for entry in changed.files] == [("a.onnx", 3), ("aa.bin", 1), ("b.onnx", 9)]
