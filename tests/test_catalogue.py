"""The catalogue, `get` and `doctor`: what is found, what this machine can do with it, and what mends a bundle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

import toolkit
from tests.command_line import called
from tests.exports import Exports
from tests.graphs import EIGHT_BITS
from toolkit.bundle.manifest import read_manifest, save_manifest
from toolkit.errors import BundleError, MachineError, RecipeError
from toolkit.files import write_json
from toolkit.pipeline import bandwidth, catalogue_row, doctor, get, planned_recipe
from toolkit.pipeline.bandwidth import MemoryBandwidth, memory_bandwidth
from toolkit.pipeline.catalogue_bundles import bundle_folders, bundle_row
from toolkit.pipeline.catalogue_row import CatalogueRow, planned_row
from toolkit.pipeline.planned_recipe import PLANNED_FILE, Planned, plan_recipe
from toolkit.recipe import data_folder, known_license, load_recipe, recipe_names
from toolkit.report.summary import load_report
from toolkit.target import TARGETS

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten gigabytes a second, whatever this machine does."""
    known = MemoryBandwidth("a processor", 2, 1e10)
    for module in (catalogue_row, doctor):
        monkeypatch.setattr(module, "memory_bandwidth", lambda anew=False: known)


def test_the_prediction_is_bandwidth_over_the_matrices_in_the_graph(exports: Exports) -> None:
    bundle = exports("cpu", (), "fp32")
    row = bundle_row(bundle)
    assert row is not None and row.predicted_tokens_per_s is not None
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    products = {node.input[1] for node in model.graph.node if node.op_type in ("MatMul", "FusedMatMul", "Gemm")}
    sizes = {}
    for tensor in model.graph.initializer:
        length = next((entry.value for entry in tensor.external_data if entry.key == "length"), "0")
        sizes[tensor.name] = int(length)
    transposed = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Transpose"}
    read = sum(sizes.get(name, sizes.get(transposed.get(name, ""), 0)) for name in products)
    assert row.predicted_tokens_per_s == pytest.approx(1e10 / read)


def test_a_plan_and_its_bundle_predict_the_same(exports: Exports, tmp_path: Path) -> None:
    bundle = exports.copy(tmp_path / "b", "cpu-split")
    (plan,) = toolkit.plan("tiny-r1-cpu-split", changes=EIGHT_BITS, out=tmp_path / "not-made")
    planned = planned_row("recipe", plan.recipe, planned_recipe.planned(plan), None)
    made = bundle_row(bundle)
    assert made is not None and made.path == str(bundle)
    assert made.bits_per_weight == planned.bits_per_weight
    assert made.predicted_tokens_per_s == planned.predicted_tokens_per_s is not None
    assert made.bundle_bytes == sum(p.stat().st_size for p in bundle.iterdir() if not _not_listed(p.name))


def _not_listed(name: str) -> bool:
    return name in ("manifest.json", "report.json", "report.html")


def test_a_validated_bundle_brings_what_was_measured(validated_bundle: Path) -> None:
    row, report = bundle_row(validated_bundle), load_report(validated_bundle)
    assert row is not None and report.parity and report.speed and report.tasks
    assert (row.mean_kld, row.top1_agreement) == (report.parity.mean_kld, report.parity.top1_agreement)
    assert row.decode_tokens_per_s == report.speed.decode_tokens_per_s and row.accuracy == report.tasks[0].accuracy
    assert row.license == "mit"


def test_every_model_of_the_recipes_has_a_licence() -> None:
    loaded = [load_recipe(name) for name in recipe_names()]
    licenses = {recipe.model: known_license(recipe.name, recipe.target) for recipe in loaded if recipe.facts()}
    assert set(licenses.values()) == {"mit", "apache-2.0", "deepseek", "gemma"}
    assert {word for model, word in licenses.items() if model.startswith("Qwen/Qwen3")} == {"apache-2.0"}
    assert {model.split("/")[0] for model, word in licenses.items() if word == "gemma"} == {"google"}
    rows = json.loads((data_folder("models") / "licenses.json").read_text(encoding="utf-8"))
    assert all("License" in row["source"] or "LICENSE" in row["source"] for row in rows.values())
    distilled = {name: row.get("base") for name, row in rows.items() if row["license"] == "mit"}
    own = [distilled.pop(name) for name in ("tiny-r1", "tiny-v3", "deepseek-r1", "phi-4-mini-reasoning")]
    assert own == [None, None, None, None]
    assert distilled.pop("8b") == "llama3.1" and distilled.pop("70b") == "llama3.3"
    assert set(distilled.values()) == {"apache-2.0"}


def test_a_search_narrows(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*words: str, **options: Any) -> set[str]:
        return {row.recipe for row in toolkit.recipes(*words, model=options.pop("model", "1.5b"), **options)}

    every = found()
    assert {"1.5b-cpu", "1.5b-qnn"} <= every and found("QWEN", "qnn") == {"1.5b-qnn"}
    assert found(license="MIT") == every and found(min_context=4096) == every
    with pytest.raises(RecipeError, match="no recipe is of that"):
        found(license="apache*")
    with pytest.raises(RecipeError, match="no recipe is of that"):
        found(max_bytes=1 << 20)
    monkeypatch.setattr(catalogue_row, "free_memory_bytes", lambda: 64 * GIB)
    assert found(runs_here=True) == {"1.5b-cpu", "1.5b-cpu-split"}
    monkeypatch.setattr(catalogue_row, "free_memory_bytes", lambda: GIB)
    with pytest.raises(RecipeError):
        found(runs_here=True)


def test_what_is_written_down_is_what_plans_say() -> None:
    """Whoever changes recipes, configs or formats runs `python docs/planned_recipes.py`. Every third recipe is planned
    here, which is all targets and nearly all models."""
    written = planned_recipe._written_down()
    known = {name: facts for name in recipe_names() if (facts := load_recipe(name).facts())}
    assert {name: row.made_of for name, row in written.items()} == {
        name: planned_recipe._made_of(name, facts) for name, facts in known.items()
    }
    some = sorted(known)[::3]
    assert {name.rpartition("-")[2] for name in some} == {name.rpartition("-")[2] for name in known}
    assert {name: written[name].planned for name in some} == {name: plan_recipe(name) for name in some}


def test_a_look_plans_what_is_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[str]()

    def counted(name: str) -> Planned:
        made.append(name)
        return plan_recipe(name)

    def found() -> list[CatalogueRow]:
        made.clear()
        return toolkit.recipes(model="tiny-r1", target="cpu*")

    monkeypatch.setattr(planned_recipe, "plan_recipe", counted)
    first = found()
    assert made == [] and len(first) == 2
    with monkeypatch.context() as edited:
        edited.setattr(planned_recipe, "_made_of", lambda name, facts: "another recipe")
        assert found() == first and made == ["tiny-r1-cpu", "tiny-r1-cpu-split"]
    (tmp_path / PLANNED_FILE).write_text('{"recipes": {"tiny-r1-cpu": 1}}', encoding="utf-8")
    monkeypatch.setattr(planned_recipe, "data_folder", lambda name: tmp_path)
    planned_recipe._written_down.cache_clear()
    assert found() == first and len(made) == 2
    planned_recipe._written_down.cache_clear()


def test_a_look_at_recipes_imports_nothing_that_exports() -> None:
    """Who looks waits for what is imported: numba and onnx_ir took longer than all else together."""
    code = (
        "import sys; from toolkit.pipeline.catalogue import Search, search_catalogue; search_catalogue(Search());"
        "print(sorted({'numba', 'onnx_ir', 'huggingface_hub', 'jinja2', 'tokenizers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_prints_what_the_library_finds(exports: Exports, tmp_path: Path) -> None:
    exports.copy(tmp_path / "mine" / "b", "cpu")
    words = ("recipes", "tiny-r1", "--target", "cpu", "--bundles", str(tmp_path), "--bundles", str(tmp_path / "none"))
    rows = json.loads(called(*words, "--json").stdout)
    assert [(row["kind"], row["recipe"]) for row in rows] == [("recipe", "tiny-r1-cpu"), ("bundle", "tiny-r1-cpu")]
    assert "mean_kld" not in rows[1] and rows[1]["path"] == str(tmp_path / "mine" / "b")
    text = called(*words).stdout
    assert "tokens/s" in text and str(tmp_path / "mine" / "b") in text
    assert called("recipes", "--max-gib", "-1").returncode == 2


def test_a_checkpoint_is_sized_without_its_weights(tiny_r1: Path) -> None:
    """A folder stands for the hub; tests/test_download.py has one over HTTP."""
    rows = toolkit.recipes(model=str(tiny_r1), hub_ids=[str(tiny_r1)], target="cpu*")
    assert [(row.kind, row.target) for row in rows] == [("hub", "cpu"), ("hub", "cpu-split")]
    assert all(row.bundle_bytes > 0 and row.license is None for row in rows)


def test_bandwidth_is_measured_once_and_the_larger_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter([3e9, 2e9, 5e9])
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bandwidth, "_measured", lambda threads: next(speeds))
    assert [memory_bandwidth().bytes_per_s for _ in range(2)] == [3e9, 3e9]
    assert memory_bandwidth(anew=True).bytes_per_s == 3e9
    assert memory_bandwidth(anew=True).bytes_per_s == memory_bandwidth().bytes_per_s == 5e9
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "file" / "no-folder"))
    monkeypatch.setattr(bandwidth, "_measured", lambda threads: 1e9)
    assert memory_bandwidth().bytes_per_s == 1e9


def test_bandwidth_is_that_of_memory() -> None:
    assert 2e8 < bandwidth._measured(1) < 2e12


def test_get_takes_the_best_that_is_here_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_row, "free_memory_bytes", lambda: 64 * GIB)
    monkeypatch.setattr(get, "provider_is_here", lambda name: name in ("qnn", "dml"))
    monkeypatch.setattr(catalogue_row, "provider_is_here", lambda name: name in ("qnn", "dml"))
    assert get.choose_target("1.5b").recipe == "1.5b-qnn"
    monkeypatch.setattr(get, "provider_is_here", lambda name: name == "dml")
    assert get.choose_target("1.5b").recipe == "1.5b-dml"
    monkeypatch.setattr(get, "provider_is_here", lambda name: False)
    chosen = get.choose_target("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "cpu")
    assert (chosen.recipe, chosen.checkpoint) == ("1.5b-cpu", None)
    assert get.choose_target("1.5b").recipe == "1.5b-cpu"
    assert get.choose_target("someone/else", "qnn") == get.ChosenTarget("qnn", "qnn", "someone/else", "asked for")
    monkeypatch.setattr(catalogue_row, "free_memory_bytes", lambda: GIB)
    with pytest.raises(MachineError, match=r"1.5b does not fit the .* GiB of free memory: cpu takes 0\.9 GiB"):
        get.choose_target("1.5b")


def test_every_device_of_a_target_has_a_rank() -> None:
    assert {target.accelerator.device for target in TARGETS.values()} == set(get._DEVICES)


def test_get_makes_a_bundle_that_answers(tiny_r1: Path, tmp_path: Path) -> None:
    words = ("get", str(tiny_r1), "--quality", "fast", "--out", str(tmp_path / "b"), "--json")
    done = called(*words)
    assert done.returncode == 0, done.stderr
    assert "note: cpu: CPUExecutionProvider is the best that is here" in done.stderr
    assert toolkit.generate(tmp_path / "b", "Add 4 and 5.").text == "9"
    wrong = called("get", "1.5c")
    assert wrong.returncode == 2 and "did you mean '1.5b'?" in wrong.stderr.splitlines()[-1]
    assert "names its target" in called("get", "1.5b-cpu").stderr


def test_doctor_says_what_runs_and_is_well(exports: Exports, tmp_path: Path) -> None:
    for target in ("cpu", "qnn"):
        exports.copy(tmp_path / target, target)
    done = called("doctor", str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert "tiny-r1-cpu, runs on CPUExecutionProvider" in done.stdout
    assert "runs on no QNNExecutionProvider: runs with --on-cpu" in done.stdout
    document = json.loads(called("doctor", str(tmp_path), "--json").stdout)
    assert document["passed"] and document["memory_bytes_per_s"] == 1e10
    assert {row["execution_provider"] for row in document["providers"]} == {
        target.accelerator.execution_provider for target in TARGETS.values()
    }


def test_doctor_names_what_mends(exports: Exports, tmp_path: Path) -> None:
    def made(name: str) -> Path:
        return exports.copy(tmp_path / name, "cpu")

    settings = made("lint") / "genai_config.json"
    raw = json.loads(settings.read_text(encoding="utf-8"))
    raw["search"]["past_present_share_buffer"] = 0 > 1
    write_json(settings, raw)
    manifest = read_manifest(tmp_path / "lint")
    size = replace(next(e for e in manifest.files if e.name == "genai_config.json"), bytes=settings.stat().st_size)
    save_manifest(tmp_path / "lint" / "manifest.json", manifest.with_files([size]))
    (made("file") / "model.onnx.data").write_bytes(b"")
    (made("report") / "report.html").unlink()
    (made("unreadable") / "manifest.json").write_text("{", encoding="utf-8")
    found = toolkit.doctor(tmp_path)
    said = {Path(bundle.path).name: bundle.ailments[0] for bundle in found.bundles}
    assert not found.passed and set(said) == {"lint", "file", "report", "unreadable"}
    assert "past_present_share_buffer" in said["lint"].problem
    assert said["lint"].command == f"toolkit export tiny-r1-cpu --out {tmp_path / 'lint'} --force"
    assert said["file"].problem == "model.onnx.data is missing or has another size"
    assert said["report"].command == f"toolkit validate {tmp_path / 'report'}"
    assert said["unreadable"].command == f"toolkit verify {tmp_path / 'unreadable'}"
    assert called("doctor", str(tmp_path)).returncode == 1


def test_doctor_opens_what_another_release_made(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = exports.copy(tmp_path / "b", "cpu")
    manifest = read_manifest(bundle)
    older = {**manifest.versions, "onnxruntime_genai": "0.12.2"}
    save_manifest(bundle / "manifest.json", replace(manifest, versions=older))
    (state,) = toolkit.doctor(tmp_path).bundles
    assert state.ailments == () and state.changed[0].startswith("onnxruntime-genai 0.12.2 to ")

    def refused(*_: object) -> None:
        raise BundleError("onnxruntime-genai does not open it")

    monkeypatch.setattr(doctor, "open_apart", refused)
    (state,) = toolkit.doctor(tmp_path).bundles
    assert [ailment.problem for ailment in state.ailments] == ["onnxruntime-genai does not open it"]
    assert state.ailments[0].command.endswith("--force")
    graph = bundle / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:200] + bytes(graph.stat().st_size - 200))
    (state,) = toolkit.doctor(tmp_path).bundles
    assert "is not an ONNX graph" in state.ailments[0].problem and state.runs_on == "nothing, as it is"


def test_doctor_sees_another_compiler(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = exports.copy(tmp_path / "b", "qnn")
    manifest = read_manifest(bundle)
    save_manifest(bundle / "manifest.json", replace(manifest, compiled={"context": "of another"}))
    monkeypatch.setattr("toolkit.pipeline.compile.htp_version", lambda: "9.9")
    (state,) = toolkit.doctor(tmp_path).bundles
    assert state.ailments[0].command == f"toolkit compile {bundle}"


def test_a_folder_of_bundles_is_not_searched_for_ever(exports: Exports, tmp_path: Path) -> None:
    exports.copy(tmp_path / "a" / "b", "cpu")
    exports.copy(tmp_path / "a" / "b" / "c" / "d", "cpu")
    deep = tmp_path / "1" / "2" / "3"
    deep.parent.mkdir(parents=True)
    shutil.copytree(tmp_path / "a" / "b", deep)
    shutil.copytree(tmp_path / "a" / "b", tmp_path / "x.partial")
    assert list(bundle_folders([tmp_path, tmp_path / "none"])) == [tmp_path / "a" / "b"]
