"""A bundle as apps use it: onnxruntime-genai's tokens, its bytes after a kill, its report, the README's lines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.command_line import called, run
from tests.exports import Exports
from tests.graphs import EIGHT_BITS, SET_EIGHT_BITS
from toolkit.bundle.manifest import read_manifest, verify_manifest
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.evaluate.session import continuations
from toolkit.pipeline.plan import plan_export
from toolkit.recipe import load_recipe
from toolkit.reference.decoder import reference_logits
from toolkit.typed_json import to_json

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def bundles(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle of each precision, which this file's tests validate."""
    folder = tmp_path_factory.mktemp("bundles")
    return {p: exports.copy(folder / p, "cpu", precision=p) for p in ("int4", "fp32")}


@pytest.fixture(scope="session")
def reports(bundles: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Both bundles judged through the command line: a fifth of the questions, and fewer where all answers are equal."""
    found = {}
    for precision, bundle in bundles.items():
        fewer = ["--examples", "100"] if precision == "int4" else ["--examples", "30", "--no-baseline", "--no-speed"]
        done = called("validate", str(bundle), *fewer, "--json")
        assert done.returncode == 0, done.stderr
        found[precision] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("length", [1, 7, 33])
def test_genai_decodes_what_the_reference_decodes(bundles: dict[str, Path], tiny_r1: Path, length: int) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    prompt = [int(i) for i in np.random.default_rng(length).integers(0, 700, length)]
    (made,) = continuations(bundles["fp32"], [prompt], 32)
    (logits,) = reference_logits(checkpoint.config, checkpoint.source, [prompt + made])
    assert made == [int(i) for i in logits[length - 1 : -1].argmax(axis=-1)]


def test_fp32_bundle_is_its_checkpoint(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["fp32"]
    assert report["parity"]["max_abs_logit_error"] <= 1e-3
    assert report["parity"]["greedy_match_tokens"] == report["parity"]["greedy_tokens"] > 5
    (task,) = report["tasks"]
    assert task["accuracy"] == task["reference_accuracy"] >= 0.8
    assert {check["name"] for check in report["verdict"]["checks"]} == {"max_abs_logit_error", "accuracy_drop"}


def test_quantized_bundle_is_close_and_plain_rounding_is_not(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["int4"]
    (task,), (plain,) = report["tasks"], report["baseline"]["tasks"]
    assert task["accuracy"] >= task["reference_accuracy"] - 0.03
    assert plain["accuracy"] < task["accuracy"] - 0.05
    assert report["parity"]["mean_kld"] < 0.002 < 0.01 < report["baseline"]["mean_kld"]
    assert task["accuracy"] - task["reference_accuracy"] == pytest.approx(
        (task["wrong_to_right"] - task["right_to_wrong"]) / task["examples"]
    )


def test_report_has_every_section_or_says_why_not(reports: dict[str, dict[str, Any]], bundles: dict[str, Path]) -> None:
    report = reports["int4"]
    sections = {"machine", "conversion", "quantization", "partition", "parity", "tasks", "speed", "verdict"}
    assert sections <= report.keys()
    assert [entry["name"] for entry in report["not_measured"]] == ["simulator", "ceiling", "tasks.examples"]
    assert all(entry["reason"] for entry in report["not_measured"])
    # Each weight once, and the gains of norms once more to see whether any is salient.
    size = (ROOT / "models/tiny-r1/model.safetensors").stat().st_size
    assert size <= report["conversion"]["bytes_read"] < 1.001 * size
    assert sum(row["bytes"] for row in report["quantization"]["by_role"]) == report["quantization"]["weight_bytes"]
    # 8, a bfloat16 scale and a byte of zero point per 32.
    assert report["quantization"]["bits_per_weight"] == 8.75
    assert report["speed"]["decode_tokens_per_s"] > 0 and report["speed"]["peak_rss_bytes"] > 1 << 20
    assert report == json.loads((bundles["int4"] / "report.json").read_text(encoding="utf-8"))
    assert "tiny-r1" in (bundles["int4"] / "report.html").read_text(encoding="utf-8")


def test_graph_passes_the_checker_and_loads_without_a_warning(bundles: dict[str, Path]) -> None:
    import onnx

    for bundle in bundles.values():
        onnx.checker.check_model(str(bundle / "model.onnx"))
        code = f"import onnxruntime as o; o.InferenceSession({str(bundle / 'model.onnx')!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_missed_threshold_is_exit_code_1_and_says_so(tiny_r1: Path, tmp_path: Path) -> None:
    words = ["--set", "validate.mean_kld=0.0000001", *SET_EIGHT_BITS, "--no-tasks", "--no-speed", "--tokens", "200"]
    done = called("export", "tiny-r1-cpu", "--out", str(tmp_path / "b"), *words)
    assert done.returncode == 1, done.stderr
    assert "FAIL: mean_kld" in done.stdout
    report = json.loads((tmp_path / "b" / "report.json").read_text(encoding="utf-8"))
    assert not report["verdict"]["passed"]
    assert {"name": "tasks", "reason": "left out by --no-tasks"} in report["not_measured"]


def test_verify_names_a_changed_file(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(bundles["int4"], bundle)
    assert verify_manifest(bundle) == []
    with (bundle / "model.onnx.data").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\x00\xff")
    assert verify_manifest(bundle) == ["model.onnx.data differs from its SHA-256"]
    assert called("verify", str(bundle)).returncode == 1


def test_export_killed_anywhere_resumes_to_the_same_bytes(bundles: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "killed"
    export = [sys.executable, "-m", "toolkit", "export", "tiny-r1-cpu", "--no-validate", *SET_EIGHT_BITS, "--out"]
    command = [*export, str(out)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    assert called(*export[3:], str(tmp_path / "whole")).returncode == 0
    files = len(list((tmp_path / "whole").iterdir()))
    kills = 0
    # Each kill is on what the one before left behind: at the first file, and once more of them are there.
    # (tests/hostile/kills.py stops exports at every event; this is the true signal, in a process as users start it.)
    for written in (1, files // 2, files - 1):
        child = subprocess.Popen(command, cwd=ROOT, **quiet)
        while child.poll() is None and len(list((tmp_path / "killed.partial").glob("*"))) < written:
            time.sleep(0.001)
        child.kill()
        kills += child.wait() != 0
    subprocess.run(command, cwd=ROOT, check=True, **quiet)
    assert kills >= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]
    for name in ("model.onnx", "model.onnx.data", "genai_config.json", "manifest.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    # The other bundle may have been judged since, which its README.md and thus its manifest show.
    for name in ("model.onnx", "model.onnx.data", "genai_config.json"):
        assert (out / name).read_bytes() == (bundles["int4"] / name).read_bytes(), name


def test_resume_packs_only_what_is_missing(bundles: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "b"
    partial = tmp_path / "b.partial"
    done = called("export", "tiny-r1-cpu", "--out", str(out), "--no-validate", *SET_EIGHT_BITS)
    assert done.returncode == 0
    # What a kill late in the pack leaves: data and journal, the last line torn.
    checkpoint = open_checkpoint(ROOT / "models" / "tiny-r1")
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    names = [t["name"] for t in report["quantization"]["tensors"]]
    os.replace(out, partial)
    begun = replace(read_manifest(partial), checkpoint=checkpoint.source.identity(), files=())
    recipe = load_recipe("tiny-r1-cpu", EIGHT_BITS)
    digest = plan_export(recipe, checkpoint, out, "int4").layout.digest()
    request = {"manifest": to_json(begun), "layout": digest}
    (partial / "request.json").write_text(json.dumps(request), encoding="utf-8")
    lines = [json.dumps({"tensor": name, "signal": 1.0, "noise": 1.0}) + "\n" for name in names]
    head = json.dumps({"layout": digest}) + "\n"
    (partial / "journal.jsonl").write_text(head + "".join(lines[:-1]) + lines[-1][:20], encoding="utf-8")
    before = (partial / "model.onnx.data").read_bytes()
    done = called("export", "tiny-r1-cpu", "--out", str(out), "--no-validate", *SET_EIGHT_BITS)
    assert done.returncode == 0, done.stderr
    assert (out / "model.onnx.data").read_bytes() == before
    tensors = json.loads((out / "report.json").read_text(encoding="utf-8"))["quantization"]["tensors"]
    assert [t["name"] for t in tensors if t["sqnr_db"] != 0] == [names[-1]]


def test_genai_config_pads_with_an_id_that_no_text_holds(bundles: dict[str, Path]) -> None:
    model = json.loads((bundles["int4"] / "genai_config.json").read_text(encoding="utf-8"))["model"]
    assert model["pad_token_id"] not in (model["eos_token_id"], model["bos_token_id"])
    vocabulary = Tokenizer.from_file(str(bundles["int4"] / "tokenizer.json")).get_vocab()
    assert model["pad_token_id"] not in vocabulary.values()


def test_validate_refuses_another_checkpoint(bundles: dict[str, Path], stories260k: Path) -> None:
    done = called("validate", str(bundles["int4"]), "--checkpoint", str(stories260k))
    assert done.returncode == 2 and "name the right one with --checkpoint" in done.stderr


def test_validate_takes_text_of_ones_own(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(bundles["int4"], bundle)
    (tmp_path / "text.txt").write_text("Add 4 and 5.\n\nSpell the word river backwards.\n", encoding="utf-8")
    words = ["--text", str(tmp_path / "text.txt"), "--no-tasks", "--no-speed", "--json"]
    report = json.loads(called("validate", str(bundle), *words).stdout)
    assert 10 < report["parity"]["tokens"] < 60


def test_bench_measures_and_refuses_what_does_not_fit(bundles: dict[str, Path]) -> None:
    words = ["bench", str(bundles["int4"]), "--json"]
    speed = json.loads(called(*words, "--prompt-tokens", "16", "--new-tokens", "8", "--repeat", "3").stdout)
    decode = sorted(one["decode_tokens_per_s"] for one in speed["runs"])
    assert len(decode) == 3 and speed["decode_tokens_per_s"] == decode[1] > 0
    refused = called(*words, "--prompt-tokens", "2000")
    assert refused.returncode == 2 and "at most 1024 tokens together" in refused.stderr


def test_generate_and_chat_answer(bundles: dict[str, Path]) -> None:
    done = run("generate", str(bundles["int4"]), "--prompt", "Add 4 and 5.")
    assert done.returncode == 0 and done.stdout.strip().endswith("9"), done.stdout
    command = [sys.executable, "-m", "toolkit", "chat", str(bundles["int4"])]
    lines = "Add 4 and 5.\nAdd 10 and 7.\n\n"
    chat = subprocess.run(command, input=lines, capture_output=True, text=True, encoding="utf-8")
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.count("</think>") == 2 and "\n9" in chat.stdout and "\n17" in chat.stdout
