"""A bundle as apps use it: onnxruntime-genai's tokens, its answers, its bytes after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from toolkit.bundle.manifest import verify_manifest
from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.weights import open_weights
from toolkit.pipeline import export_bundle
from toolkit.recipe import load_recipe
from toolkit.reference.decoder import reference_logits
from toolkit.validate.session import greedy_tokens


@pytest.fixture(scope="session")
def bundles(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    recipe = load_recipe("tiny-r1-cpu")
    return {p: export_bundle(recipe, tiny_r1, folder / p, p) for p in ("int4", "fp32")}


@pytest.mark.parametrize("length", [1, 7, 33])
def test_genai_decodes_what_the_reference_decodes(bundles: dict[str, Path], tiny_r1: Path, length: int) -> None:
    config = read_config(tiny_r1)
    prompt = [int(i) for i in np.random.default_rng(length).integers(0, 700, length)]
    made = greedy_tokens(bundles["fp32"], prompt, 32)
    (logits,) = reference_logits(config, open_weights(tiny_r1, config), [prompt + made])
    assert made == [int(i) for i in logits[length - 1 : -1].argmax(axis=-1)]


def test_quantized_bundle_answers_as_well_as_the_fp32_one(
    bundles: dict[str, Path], tiny_r1: Path, test_questions: list[dict[str, str]]
) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_r1 / "tokenizer.json"))

    def accuracy(bundle: Path) -> float:
        right = 0
        for question in test_questions[:100]:
            prompt = tokenizer.encode(question["prompt"], add_special_tokens=False).ids
            text = tokenizer.decode(greedy_tokens(bundle, prompt, 300), skip_special_tokens=True)
            right += text.split("</think>")[-1].strip() == question["answer"]
        return right / 100

    fp32 = accuracy(bundles["fp32"])
    assert fp32 >= 0.8
    assert accuracy(bundles["int4"]) >= fp32 - 0.04


def test_verify_names_a_changed_file(tiny_r1: Path, tmp_path: Path) -> None:
    recipe = load_recipe("tiny-r1-cpu")
    bundle = export_bundle(recipe, tiny_r1, tmp_path / "b", "int4")
    assert verify_manifest(bundle) == []
    with (bundle / "model.onnx.data").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\x00\xff")
    assert verify_manifest(bundle) == ["model.onnx.data differs from its SHA-256"]


def test_killed_export_resumes_to_the_same_bytes(bundles: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "toolkit", "export", "tiny-r1-cpu", "--out", str(out), "--no-validate"]
    child = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL)
    journal = tmp_path / "killed.partial" / "journal.txt"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        if journal.exists() and len(journal.read_text(encoding="utf-8").split()) >= 3:
            os.kill(child.pid, signal.SIGKILL)
            break
    child.wait()
    assert not out.exists(), "the export ended before it could be killed"
    subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, stdout=subprocess.DEVNULL)
    for name in ("model.onnx", "model.onnx.data", "genai_config.json", "manifest.json"):
        assert (out / name).read_bytes() == (bundles["int4"] / name).read_bytes(), name


def test_genai_config_pads_with_an_id_that_no_text_holds(bundles: dict[str, Path]) -> None:
    model = json.loads((bundles["int4"] / "genai_config.json").read_text(encoding="utf-8"))["model"]
    assert model["pad_token_id"] not in (model["eos_token_id"], model["bos_token_id"])
    vocabulary = Tokenizer.from_file(str(bundles["int4"] / "tokenizer.json")).get_vocab()
    assert model["pad_token_id"] not in vocabulary.values()


def test_validate_needs_neither_checkpoint_nor_text_of_its_own(
    bundles: dict[str, Path], tiny_r1: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "checkpoint"
    shutil.copytree(tiny_r1, bare, ignore=shutil.ignore_patterns("validation.jsonl"))
    for place in ([], ["--checkpoint", str(bare)]):
        command = [sys.executable, "-m", "toolkit", "validate", str(bundles["int4"]), "--tokens", "300", *place]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        assert "pass: mean_kld" in done.stdout


def test_bench_measures_and_refuses_what_does_not_fit(bundles: dict[str, Path]) -> None:
    def bench(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "toolkit", "bench", str(bundles["int4"]), "--json", *options]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")

    speed = json.loads(bench("--prompt-tokens", "16", "--new-tokens", "8", "--repeat", "3").stdout)
    decode = sorted(run["decode_tokens_per_s"] for run in speed["runs"])
    assert len(decode) == 3 and speed["decode_tokens_per_s"] == decode[1] > 0
    refused = bench("--prompt-tokens", "2000")
    assert refused.returncode == 2 and "at most 1024 tokens together" in refused.stderr
