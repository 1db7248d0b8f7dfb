"""The commands that plan, list and look: what they print, what they leave alone, how fast they answer."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command_line import called, run
from tests.exports import Exports
from tests.graphs import SET_EIGHT_BITS
from toolkit.recipe import recipe_names


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['toolkit', '--help']\n"
        "from toolkit.cli.commands import main\n"
        "try: main()\n"
        "finally: print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'torch', 'rich', 'jinja2', 'huggingface_hub'}))"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout.strip().endswith("[]"), done.stdout
    assert time.perf_counter() - begin < 2  # half a second on a quiet machine


@pytest.mark.parametrize(("recipe", "gigabytes"), [("1.5b-cpu", 2), ("14b-cpu", 7), ("70b-cpu", 2), ("0528-8b-cpu", 6)])
def test_dry_run_needs_no_checkpoint_and_writes_nothing(recipe: str, gigabytes: int, tmp_path: Path) -> None:
    """Memory is some layers' and an input's; the 70B is rounded without text."""
    done = called("export", recipe, "--dry-run", "--json", "--out", str(tmp_path / "b"))
    if done.returncode == 2 and done.stderr.startswith("error: the disk has"):
        return  # as an export of it would say here
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert list(tmp_path.iterdir()) == []
    data = next(file["bytes"] for file in plan["files"] if file["name"] == "model.onnx.data")
    assert data == pytest.approx(plan["bits_per_weight"] * plan["weights"] / 8, rel=0.01)
    assert plan["peak_memory_bytes"] < gigabytes << 30


def test_dry_run_forecasts_what_the_export_writes(tmp_path: Path) -> None:
    words = ["export", "tiny-r1-cpu", "--out", str(tmp_path / "b"), *SET_EIGHT_BITS]
    plan = json.loads(called(*words, "--dry-run", "--json").stdout)
    assert run(*words, "--no-validate").returncode == 0  # its own peak of memory
    forecast = {file["name"]: file["bytes"] for file in plan["files"]}
    assert (tmp_path / "b" / "model.onnx.data").stat().st_size == forecast["model.onnx.data"]
    assert (tmp_path / "b" / "model.onnx").stat().st_size == pytest.approx(forecast["model.onnx"], rel=0.1)
    report = json.loads((tmp_path / "b" / "report.json").read_text(encoding="utf-8"))
    assert report["conversion"]["peak_rss_bytes"] < plan["peak_memory_bytes"]


def test_synthetic_bundle_is_marked_and_judged(tmp_path: Path) -> None:
    out = tmp_path / "b"
    done = called("export", "tiny-r1-cpu", "--synthetic", "--out", str(out))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["synthetic"] and "random weights" in (out / "report.html").read_text(encoding="utf-8")
    report = json.loads(called("validate", str(out), "--no-tasks", "--json").stdout)
    assert report["synthetic"] and report["parity"]["mean_kld"] < 0.01 and report["speed"]["decode_tokens_per_s"] > 0
    refused = called("generate", str(out), "--prompt", "hello")
    assert refused.returncode == 2 and "no words, only speed" in refused.stderr


def test_bare_target_converts_a_checkpoint_without_a_recipe(tiny_r1: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", str(tiny_r1), "--out", str(tmp_path / "b"), "--no-validate", "--quality", "fast"]
    done = called("export", "cpu", *words)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["recipe"]["name"] == "tiny-r1-cpu" and manifest["recipe"]["context_length"] == 1024
    refused = called("export", "cpu")
    assert refused.returncode == 2 and "name what to convert with --checkpoint" in refused.stderr


def test_synthetic_weights_of_a_folder_without_a_recipe_can_be_validated(stories260k: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "b", tmp_path / "c"
    folder.mkdir()
    shutil.copy(stories260k / "config.json", folder)
    done = called("export", "cpu", "--synthetic", "--checkpoint", str(folder), "--out", str(out))
    assert done.returncode == 0, done.stderr
    words = ["--tokens", "64", "--no-speed", "--json"]
    report = json.loads(called("validate", str(out), *words).stdout)
    assert report["synthetic"] and report["parity"]["tokens"] >= 64
    shutil.rmtree(folder)
    refused = called("validate", str(out))
    assert refused.returncode == 2 and "name a folder with a config.json" in refused.stderr
    again = json.loads(called("validate", str(out), "--checkpoint", str(stories260k), *words).stdout)
    assert again["parity"]["mean_kld"] == report["parity"]["mean_kld"]


def test_set_changes_the_recipe(tiny_r1: Path, tmp_path: Path) -> None:
    changes = ["--set", "quantize.0={match: '*.down_proj', bits: 8}", "--set", "quantize.1={match: '*'}"]
    changes += ["--quality", "fast"]
    done = called("export", "tiny-r1-cpu", "--out", str(tmp_path / "b"), "--no-validate", *changes)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "b" / "report.json").read_text(encoding="utf-8"))
    bits = {row["role"]: row["bits"] for row in report["quantization"]["by_role"]}
    assert bits["down_proj"] == 8 and bits["up_proj"] == bits["lm_head"] == 4


def test_recipes_lists_what_this_machine_can_do() -> None:
    rows = {row["recipe"]: row for row in json.loads(called("recipes", "--json").stdout)}
    assert sorted(rows) == recipe_names()
    assert rows["tiny-r1-cpu"]["here"] == "exports and runs"
    assert 7.5e9 < rows["14b-cpu"]["bundle_bytes"] < 11e9


def test_inspect_reads_checkpoints_and_bundles(tiny_r1: Path, exports: Exports, tmp_path: Path) -> None:
    facts = json.loads(called("inspect", str(tiny_r1), "--json").stdout)
    assert facts["kind"] == "checkpoint" and facts["model_type"] == "qwen2" and facts["parameters"] == 3_674_368
    out = exports("cpu")
    facts = json.loads(called("inspect", str(out), "--json").stdout)
    assert facts["kind"] == "bundle" and facts["operators"]["GroupQueryAttention"] == 4
    assert "recipe: tiny-r1-cpu" in called("inspect", str(out)).stdout
    refused = called("inspect", str(tmp_path))
    assert refused.returncode == 2 and "neither a bundle" in refused.stderr


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_harness_says_what_it_lacks(tmp_path: Path) -> None:
    done = called("harness", str(tmp_path), "--tasks", "gsm8k", "--limit", "1")
    assert done.returncode == 2 and "error: lm_eval is not installed: pip install lm_eval" in done.stderr


def test_recipes_are_filtered_by_model_and_target() -> None:
    def names(*words: str) -> list[str]:
        return [row["recipe"] for row in json.loads(called("recipes", *words, "--json").stdout)]

    assert names("--model", "14b", "--target", "cpu*") == ["14b-cpu", "14b-cpu-split"]
    assert names("--model", "deepseek-ai/deepseek-r1-distill-llama-8b", "--target", "qnn") == ["8b-qnn"]
    assert names("--model", "*-70B", "--target", "dml") == ["70b-dml"]
    refused = called("recipes", "--model", "15b")
    assert refused.returncode == 2 and "no recipe is of that: models are 0528-8b, 1.5b" in refused.stderr


def test_a_hub_id_of_a_known_model_is_said_to_be_its_recipe(tmp_path: Path) -> None:
    words = ["--dry-run", "--json", "--out", str(tmp_path / "b")]
    done = called("export", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", *words)
    assert json.loads(done.stdout)["recipe"] == "1.5b-cpu"
    assert "note: deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B has a recipe of its own: 1.5b-cpu" in done.stderr
    refused = called("export", "tiny-r1", *words)
    assert refused.returncode == 2 and "name its target too: tiny-r1-cpu, " in refused.stderr


def test_a_recipes_model_may_be_a_folder_beside_it(tiny_r1: Path, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "checkpoint", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    shutil.copy(tiny_r1 / "config.json", folder)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine-cpu\nmodel: checkpoint\ntarget: cpu\ncontext_length: 256\n", encoding="utf-8")
    out = str(tmp_path / "b")
    # Shapes need the config alone; a plan of a folder looks at the weights that it is for.
    done = called("export", str(recipe), "--synthetic", "--no-validate", "--out", out)
    assert done.returncode == 0, done.stderr
    refused = called("export", str(recipe), "--dry-run", "--out", out)
    assert refused.returncode == 2 and "model.safetensors is missing" in refused.stderr
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(tiny_r1 / name, folder)
    plan = json.loads(called("export", str(recipe), "--dry-run", "--json", "--out", out).stdout)
    assert Path(plan["model"]) == folder and plan["weights"] == 3_670_016
