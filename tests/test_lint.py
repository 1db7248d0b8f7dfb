"""The linter of genai_config.json: silent on what we make, and one line for each thing planted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import called
from tests.exports import Exports
from toolkit.bundle.lint import lint_bundle
from toolkit.errors import BundleError


@pytest.fixture(scope="module")
def bundle(exports: Exports) -> Path:
    return exports("cpu")


def _set(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value

    return change


CASES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a key of later versions": (_set("model.bor_token_id", 1), "model has 'bor_token_id'"),
    "a misspelt search key": (_set("search.max_lenght", 1), "search has 'max_lenght'"),
    "a missing file": (_set("model.decoder.filename", "decoder.onnx"), "names no file of the bundle"),
    "a file outside": (_set("model.decoder.filename", "../b/model.onnx"), "names no file of the bundle"),
    "a wrong input": (_set("model.decoder.inputs.attention_mask", "mask"), "names 'mask', which the graph"),
    "a wrong cache": (_set("model.decoder.inputs.past_key_names", "past.%d.key"), "names 'past.0.key'"),
    "too few layers": (_set("model.decoder.num_hidden_layers", 3), "input 'past_key_values.3.key' is not named"),
    "a wrong vocabulary": (_set("model.vocab_size", 1000), "the graph's logits have 1024"),
    "a wrong head": (_set("model.decoder.head_size", 32), "the graph's cache has 64"),
    "too long": (_set("search.max_length", 4096), "max_length 4096 is more than model.context_length 1024"),
    "no shared buffer": (_set("search.past_present_share_buffer", False), "is not true"),
    "an unknown type": (_set("model.type", "qwen9"), "model.type is 'qwen9', expected one of"),
    "no end": (_set("model.eos_token_id", []), "model.eos_token_id is [], expected"),
    "an end without a type": (_set("model.eos_token_id", "764"), "model.eos_token_id is '764', expected"),
    "an end beyond the vocabulary": (_set("model.eos_token_id", [1, 1024]), "eos_token_id 1024 is no id"),
    "a pad id of text": (_set("model.pad_token_id", 300), "300 is a token of text"),
    "a pad id of the template": (
        _set("model.pad_token_id", 765),
        "765 is '<｜User｜>', which the chat template writes",
    ),
    "pad is bos": (lambda c: _set("model.pad_token_id", c["model"]["bos_token_id"])(c), "is the beginning of sentence"),
    "pad is eos": (lambda c: _set("model.pad_token_id", c["model"]["eos_token_id"][0])(c), "is an end of sentence"),
}


def test_a_fresh_bundle_has_nothing_to_say(bundle: Path) -> None:
    assert lint_bundle(bundle) == []
    assert called("check", str(bundle)).returncode == 0


def test_an_added_token_that_no_template_writes_may_pad(bundle: Path, tmp_path: Path) -> None:
    """SmolLM2's tokenizer has its added tokens among the others too."""
    shutil.copytree(bundle, tmp_path / "b")
    for name, change in (
        ("genai_config.json", _set("model.pad_token_id", 300)),
        ("tokenizer.json", lambda raw: raw["added_tokens"].append({"id": 300, "content": "<repo_name>"})),
    ):
        path = tmp_path / "b" / name
        raw = json.loads(path.read_text(encoding="utf-8"))
        change(raw)
        path.write_text(json.dumps(raw), encoding="utf-8")
    assert lint_bundle(tmp_path / "b") == []


@pytest.mark.parametrize("case", CASES)
def test_each_planted_problem_is_named_once(case: str, bundle: Path, tmp_path: Path) -> None:
    change, message = CASES[case]
    shutil.copytree(bundle, tmp_path / "b")
    path = tmp_path / "b" / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config), encoding="utf-8")
    problems = lint_bundle(tmp_path / "b")
    assert sum(message in problem for problem in problems) == 1, problems


def test_check_fails_with_exit_code_1_and_refuses_what_is_no_bundle(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "b")
    (tmp_path / "b" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="is not an ONNX graph"):
        lint_bundle(tmp_path / "b")
    (tmp_path / "b" / "model.onnx").unlink()
    done = called("check", str(tmp_path / "b"), "--json")
    assert done.returncode == 1 and not json.loads(done.stdout)["passed"]
    refused = called("check", str(tmp_path))
    assert refused.returncode == 2 and "not a finished bundle" in refused.stderr
