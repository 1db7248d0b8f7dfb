"""README.md of a bundle: its program runs and answers, its figures are the report's, and it is a file of the bundle."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import toolkit
from tests.exports import Exports
from toolkit.bundle.manifest import read_manifest, verify_manifest
from toolkit.evaluate.conversation import Conversation
from toolkit.files import write_json
from toolkit.report.intact import verify_bundle
from toolkit.report.readme import QUESTION, model_name, readme_text
from toolkit.report.summary import amend_report, load_report, write_report


def _readme(bundle: Path) -> str:
    return (bundle / "README.md").read_text(encoding="utf-8")


def _program(bundle: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", _readme(bundle), re.DOTALL)
    return str(code)


@pytest.mark.parametrize("target", ["cpu", "cpu-split"])
def test_the_program_answers_as_the_bundle_does(exports: Exports, target: str) -> None:
    bundle = exports(target)
    code = _program(bundle)
    assert len(code.strip().splitlines()) <= 13
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=bundle, capture_output=True, text=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    conversation = Conversation(bundle, 400)
    expected = "".join(conversation.ask(QUESTION))
    assert "</think>" in expected and done.stdout.strip() == expected.strip()


def test_random_weights_run_without_words(tiny_r1: Path, tmp_path: Path) -> None:
    plans = toolkit.plan("cpu", checkpoint=tiny_r1, synthetic=True, out=tmp_path / "b", changes=["context_length=64"])
    (bundle,) = toolkit.export(plans)
    assert "weights are random" in _readme(bundle)
    done = subprocess.run([sys.executable, "-c", _program(bundle)], cwd=bundle, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.split()) == 32, done.stderr[-2000:]


def test_a_plugin_is_registered_and_named(exports: Exports) -> None:
    text, code = _readme(exports("qnn")), _program(exports("qnn"))
    assert "pip install 'onnxruntime>=1.23' 'onnxruntime-genai>=0.12.2' onnxruntime-qnn\n" in text
    assert 'og.register_execution_provider_library("QNNExecutionProvider", onnxruntime_qnn.get_library_path())' in code
    compile(code, "README.md", "exec")
    assert "AMD's Ryzen AI software" in _readme(exports("vitisai")) and "pip install" not in _readme(exports("vitisai"))


def test_it_says_how_to_tell_thought_from_answer(exports: Exports) -> None:
    bundle = exports("cpu")
    said = json.loads((bundle / "reasoning.json").read_text(encoding="utf-8"))
    settings = json.loads((bundle / "genai_config.json").read_text(encoding="utf-8"))
    text = _readme(bundle)
    assert said["prompt_opens_thought"] and "the prompt ends with `<think>`" in text
    assert all(f"`{stop['token']}` ({stop['id']})" in text for stop in said["stop_tokens"])
    assert f"Context: {settings['model']['context_length']:,} tokens" in text
    assert all(f"{key} {value}" in text for key, value in said["sampling"].items())


def test_a_model_that_does_not_think_is_said_to(exports: Exports, tmp_path: Path) -> None:
    bundle = exports.copy(tmp_path / "b", "cpu")
    raw = json.loads((bundle / "reasoning.json").read_text(encoding="utf-8"))
    del raw["begin_of_thought"], raw["end_of_thought"]
    write_json(bundle / "reasoning.json", {**raw, "prompt_opens_thought": False})
    amend_report(bundle, lambda report: report)
    assert "the model writes none" in _readme(bundle) and "<think>" not in _readme(bundle)


def test_it_is_a_file_of_the_bundle_and_names_no_place(exports: Exports, tiny_r1: Path, tmp_path: Path) -> None:
    bundle = exports.copy(tmp_path / "b", "cpu")
    manifest = read_manifest(bundle)
    assert "README.md" in [entry.name for entry in manifest.files]
    assert str(tiny_r1.parent) not in _readme(bundle) and "`tiny-r1` as an ONNX graph" in _readme(bundle)
    assert readme_text(bundle, manifest, load_report(bundle)) == _readme(bundle)
    (bundle / "README.md").write_text("mine", encoding="utf-8")
    assert "README.md has 4 bytes" in verify_bundle(bundle).problems[0]


def test_validation_brings_its_figures(validated_bundle: Path) -> None:
    report, text = load_report(validated_bundle), _readme(validated_bundle)
    assert report.speed is not None and report.parity is not None and report.tasks is not None
    assert f"| Top-1 agreement | {report.parity.top1_agreement:.1%} |" in text
    assert f"{report.tasks[0].accuracy:.1%} right" in text and "Not compared" not in text
    assert verify_manifest(validated_bundle) == []


def test_a_missed_threshold_is_said(exports: Exports, validated_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(validated_bundle, tmp_path / "b"))
    report = load_report(bundle)
    assert report.verdict is not None
    write_report(bundle, replace(report, verdict=replace(report.verdict, passed=False)))
    assert "misses a threshold" in _readme(bundle) and verify_manifest(bundle) == []
    assert "Not compared with its checkpoint yet" in _readme(exports("cpu"))


def test_a_kill_between_it_and_the_manifest_is_no_fault(exports: Exports, tmp_path: Path) -> None:
    bundle = exports.copy(tmp_path / "b", "cpu")
    kept = (bundle / "manifest.json").read_bytes()
    amend_report(bundle, lambda report: replace(report, kv_cache=None))
    assert (bundle / "manifest.json").read_bytes() != kept
    (bundle / "manifest.json").write_bytes(kept)
    assert verify_manifest(bundle) and verify_bundle(bundle).problems == ()


def test_who_writes_into_it_may_still_validate(validated_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(validated_bundle, tmp_path / "b"))
    (bundle / "README.md").write_text("mine", encoding="utf-8")
    toolkit.validate(bundle, effort=toolkit.Effort(tokens=20, examples=1, speed=False, baseline=False))
    assert verify_bundle(bundle).problems == () and "| Mean KLD |" in _readme(bundle)


def test_an_edited_manifest_gets_no_new_digest(exports: Exports, tmp_path: Path) -> None:
    bundle = exports.copy(tmp_path / "b", "cpu")
    raw = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    write_json(bundle / "manifest.json", {**raw, "precision": "fp32"})
    amend_report(bundle, lambda report: replace(report, kv_cache=None))
    assert any("manifest.json was changed" in line for line in verify_bundle(bundle).problems)


@pytest.mark.parametrize(
    ("model", "name"),
    [("org/model", "org/model"), ("/a/b/model", "model"), ("C:\\a\\model", "model"), ("../model", "../model")],
)
def test_a_model_is_named_without_its_folders(exports: Exports, model: str, name: str) -> None:
    manifest = read_manifest(exports("cpu"))
    assert model_name(replace(manifest, recipe=replace(manifest.recipe, model=model))) == name
