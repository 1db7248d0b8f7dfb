"""The one reader of genai_config.json: whatever stands in it is read, or refused in a line; changes change no more."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.graphs import recipe_for, write_graphs
from tests.pipeline_config import copy_without_weights
from toolkit.bundle.lint import lint_bundle
from toolkit.bundle.settings import Settings, read_settings
from toolkit.bundle.stage_files import compiled_settings, compiled_stages, uncompiled_settings
from toolkit.errors import BundleError
from toolkit.graph.interface import read_interface

ODD: tuple[object, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    math.nan,
    math.inf,
    "",
    "x",
    "\ud800",
    "../x",
    [],
    [None],
    {},
    {"x": 1},
    [[]],
)


@pytest.fixture(scope="module")
def bundle(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings") / "b"
    write_graphs(tiny_r1, folder, "qnn", recipe_for("qnn"))
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each (container, key) of a JSON value, the outer ones first."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def test_whatever_stands_anywhere_is_read_or_refused_in_a_line(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.bundle.lint.read_interface", functools.cache(read_interface))
    path = copy_without_weights(bundle, tmp_path / "b") / "genai_config.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    refused = said = 0
    for number, (holder, key) in enumerate(list(places(whole))):
        kept = holder[key]
        # Every third value, another third at the next place: all of them everywhere take three times as long.
        for value in ODD[number % 3 :: 3]:
            holder[key] = value
            path.write_text(json.dumps(whole), encoding="utf-8")
            try:
                settings = read_settings(path.parent)
                assert settings.length_for(100, 10) <= settings.context_length and settings.stages
            except BundleError as problem:
                refused += 1
                assert "\n" not in str(problem) and len(str(problem)) < 600
            try:
                problems = lint_bundle(path.parent)
            except BundleError as problem:  # what is no JSON object of text
                problems = [str(problem)]
            said += bool(problems)
            assert all("\n" not in line for line in problems)
        holder[key] = kept
    assert refused > 100 and said > 100
    assert isinstance(json.loads(path.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("context_length", 0, "model.context_length is 0, expected 1 to 2147483647"),
        ("context_length", "1024", "model.context_length is '1024', expected a whole number"),
        ("vocab_size", True, "model.vocab_size is True, expected a whole number"),
        ("eos_token_id", [], "model.eos_token_id is missing"),
        ("eos_token_id", [1, "2"], r"model.eos_token_id\[1\] is '2', expected a whole number"),
        ("decoder", [], r"model.decoder is \[\], expected an object"),
        ("pad_token_id", None, "model.pad_token_id is None, expected a whole number"),
    ],
)
def test_what_is_wrong_is_named(key: str, value: object, words: str, bundle: Path, tmp_path: Path) -> None:
    path = copy_without_weights(bundle, tmp_path / "b") / "genai_config.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    whole["model"][key] = value
    path.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(BundleError, match=f"is not whole: {words}.*see `toolkit check"):
        read_settings(path.parent)


def test_one_id_that_ends_an_answer_is_a_list_of_one(bundle: Path, tmp_path: Path) -> None:
    path = copy_without_weights(bundle, tmp_path / "b") / "genai_config.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    whole["model"]["eos_token_id"] = 7
    path.write_text(json.dumps(whole), encoding="utf-8")
    assert read_settings(path.parent).eos_token_ids == (7,)


def _sections(settings: Settings) -> dict[str, dict[str, Any]]:
    (group,) = json.loads(settings.text)["model"]["decoder"]["pipeline"]
    return dict(group)


def test_changed_settings_change_what_they_say_and_nothing_else(bundle: Path) -> None:
    settings = read_settings(bundle)
    assert settings.providers() == ["qnn"] and settings.window == 8 and settings.is_pipeline
    compiled = compiled_settings(settings, ["context", "iterator"])
    assert compiled_stages(compiled) == ["context", "iterator"] and compiled_stages(settings) == []
    assert _sections(compiled)["context"]["filename"] == "context_ctx.onnx"
    assert uncompiled_settings(compiled) == settings
    assert uncompiled_settings(compiled).text == settings.text
    on_cpu = settings.on_cpu()
    assert on_cpu.providers() == []
    for name, section in _sections(on_cpu).items():
        was = _sections(settings)[name]
        assert section == {**was, "session_options": {**was["session_options"], "provider_options": []}}
    threaded = _sections(settings.with_threads(3))
    for name, section in threaded.items():
        was = _sections(settings)[name]
        assert section == {**was, "session_options": {**was["session_options"], "intra_op_num_threads": 3}}
    other = settings.for_soc({"soc_model": "999", "unheard_of": "1"})
    assert other.soc_options() == {**settings.soc_options(), "soc_model": "999"}
    told = settings.with_provider_options(lambda name, given: {"was": name}, {"session.x": "1"})
    for name, section in _sections(told).items():
        accelerated = name in ("context", "iterator")
        assert ("session.x" in section["session_options"]) == accelerated
        assert section["session_options"]["provider_options"] == ([{"qnn": {"was": "qnn"}}] if accelerated else [])
