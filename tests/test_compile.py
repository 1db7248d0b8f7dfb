"""Ahead of time: tiny-r1 compiled for HTP in two parts, what is true of the files, and each way to fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import toolkit
from tests.command_line import called
from tests.compiler import needs_compiler
from tests.exports import IN_TWO_PARTS, Exports
from tests.graphs import EIGHT_BITS, SET_EIGHT_BITS
from toolkit import apart
from toolkit.bundle.compiled import lint_compiled
from toolkit.bundle.lint import lint_bundle
from toolkit.bundle.manifest import read_manifest, save_manifest, verify_manifest
from toolkit.bundle.settings import read_genai_config
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.epcontext import htp
from toolkit.epcontext import parts as compiling
from toolkit.errors import BundleError, MachineError, UnsupportedError
from toolkit.evaluate import simulator
from toolkit.evaluate.parity import Comparison
from toolkit.evaluate.positions import open_positions, some_ids
from toolkit.evaluate.session import continuations
from toolkit.evaluate.simulator import simulate, simulated_divergence
from toolkit.graph.interface import external_bytes
from toolkit.pipeline.check import check_bundle
from toolkit.pipeline.compile import compile_bundle, compile_exported
from toolkit.pipeline.plan import plan_export
from toolkit.pipeline.text import token_sequences
from toolkit.recipe import load_recipe
from toolkit.reference.decoder import reference_logits
from toolkit.soc import SOCS

STAGES = ("context_0", "context_1", "iterator_0", "iterator_1")
BINARIES = ("context_0_ctx_qnn.bin", "context_1_ctx_qnn.bin")
# A child that does something at the part that begins with a stage, and compiles all others.
CHILD = """
import json, os, resource, runpy, signal, sys
if json.load(open(sys.argv[-2]))["stages"][0] == {stage!r}:
    {what}
sys.argv = sys.argv[-3:]
runpy.run_module("toolkit.epcontext.child", run_name="__main__")
"""
# A child that leaves a node outside, and reports success.
LIAR = """
import json, onnx, sys
job = json.load(open(sys.argv[-2]))
graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["a"], ["b"], name="/l/Relu")], "g", [], [])
for stage in job["stages"]:
    onnx.save(onnx.helper.make_model(graph), job["out"] + f"/{stage}_ctx.onnx")
open(sys.argv[-1], "w").write('{"peak_rss_bytes": 1}')
"""


@pytest.fixture(scope="session")
def uncompiled(exports: Exports) -> Path:
    return exports("qnn", IN_TWO_PARTS)


@pytest.fixture(scope="session")
def compiled(uncompiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("compiled") / "b"
    shutil.copytree(uncompiled, bundle)
    compile_bundle(bundle)
    return bundle


@pytest.fixture
def bundle(uncompiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(uncompiled, tmp_path / "b"))


@pytest.fixture
def compiled_copy(compiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "b"))


def _report(bundle: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    return report


def _put_in_place(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    """Runs `command` where a module would be run apart."""
    monkeypatch.setattr(apart, "python_module", lambda module: command)


def _plant(monkeypatch: pytest.MonkeyPatch, what: str, stage: str = "context_1") -> None:
    _put_in_place(monkeypatch, [sys.executable, "-c", CHILD.format(stage=stage, what=what)])


@needs_compiler
def test_each_stage_is_one_node_that_runs_from_its_parts_binary(compiled: Path) -> None:
    (pipeline,) = read_genai_config(compiled)["model"]["decoder"]["pipeline"]
    for stage in STAGES:
        assert pipeline[stage]["filename"] == f"{stage}_ctx.onnx"
        (options,) = pipeline[stage]["session_options"]["provider_options"]
        assert options["qnn"]["backend_path"] == "QnnHtp.dll" and options["qnn"]["soc_model"] == "60"
        model = onnx.load(compiled / f"{stage}_ctx.onnx")
        (node,) = model.graph.node
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (node.op_type, node.domain, attributes["embed_mode"]) == ("EPContext", "com.microsoft", 0)
        assert attributes["ep_cache_context"].decode() == BINARIES[int(stage[-1])]
        # As our own graphs: ONNX Runtime would write its newest, which older ones refuse.
        assert model.ir_version == 10 and {o.domain for o in model.opset_import} == {"", "com.microsoft"}
    assert [pipeline[stage]["filename"] for stage in ("embeddings", "lm_head")] == ["embeddings.onnx", "lm_head.onnx"]
    assert not compiled.with_name("b.compile").exists() and (compiled / "compile.log").is_file()


@needs_compiler
def test_manifest_and_report_know_the_binaries(compiled: Path, uncompiled: Path) -> None:
    names = {entry.name for entry in read_manifest(compiled).files}
    assert names >= {*BINARIES, *(f"{stage}_ctx.onnx" for stage in STAGES), "context_0.onnx", "transformer.onnx.data"}
    assert verify_manifest(compiled) == []
    rows = {row["stage"]: row for row in _report(compiled)["partition"]}
    for stage in STAGES:
        row = rows[stage]
        assert row["compiled"] and row["file"] == f"{stage}_ctx.onnx" and row["nodes_on_ep"] == row["nodes"] > 30
        assert row["bin_bytes"] == (compiled / row["bin"]).stat().st_size
        # Weights and code, once for both stages: twice the weights would be more.
        weights = external_bytes(compiled / f"{stage}.onnx")
        assert weights < row["bin_bytes"] < 1.5 * weights
    assert not rows["lm_head"]["compiled"] and "bin_bytes" not in rows["lm_head"]
    made = _report(compiled)["conversion"]
    assert [row["stages"] for row in made["compiled_parts"]] == [[f"context_{k}", f"iterator_{k}"] for k in (0, 1)]
    assert all(100 << 20 < row["peak_rss_bytes"] < 2 << 30 for row in made["compiled_parts"])
    assert [stage["name"] for stage in made["stages"]].count("compile") == 1
    assert "partition.bin_bytes" not in {entry["name"] for entry in _report(compiled)["not_measured"]}
    assert not any(row["compiled"] for row in _report(uncompiled)["partition"])


@needs_compiler
def test_compiling_again_does_nothing(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _put_in_place(monkeypatch, ["no such program"])
    assert [row.compiled for row in compile_bundle(compiled)] == [False, True, True, True, True, False]


@needs_compiler
def test_a_compiled_bundle_runs_its_graphs_on_the_cpu(compiled: Path, uncompiled: Path) -> None:
    prompts = [[5, 6, 7] * n for n in (1, 30)]
    made = continuations(compiled, prompts, 16, on_cpu=True)
    assert made == continuations(uncompiled, prompts, 16, on_cpu=True) and len(made[1]) > 4


@needs_compiler
def test_a_bundle_is_compiled_for_another_soc(compiled_copy: Path) -> None:
    done = called("compile", str(compiled_copy), "--soc", "x2-elite")
    assert done.returncode == 0, done.stderr
    (pipeline,) = read_genai_config(compiled_copy)["model"]["decoder"]["pipeline"]
    for stage in STAGES:
        (options,) = pipeline[stage]["session_options"]["provider_options"]
        assert (options["qnn"]["soc_model"], options["qnn"]["htp_arch"]) == ("88", "81")
    assert read_manifest(compiled_copy).recipe.soc == "x2-elite" and verify_manifest(compiled_copy) == []
    assert lint_compiled(compiled_copy, "x2-elite") == [] and check_bundle(compiled_copy, run=False).passed
    (ceiling,) = _report(compiled_copy)["ceiling"]
    assert ceiling["device"] == SOCS["x2-elite"].device
    assert ceiling["decode_tokens_per_s"] == pytest.approx(152e9 / ceiling["weight_bytes_per_token"])
    assert called("compile", str(compiled_copy), "--soc", "x3").returncode == 2


@needs_compiler
def test_check_passes_and_knows_another_soc(compiled: Path) -> None:
    assert check_bundle(compiled, run=False).problems == ()
    problems = lint_compiled(compiled, "x2-elite")
    words = "compiled for HTP arch and SoC model 73 and 60, the recipe's soc x2-elite has 81 and 88"
    assert len(problems) == 4 and all(words in line for line in problems)


def _edit(stage: str, change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], object]:
    def edit(bundle: Path) -> None:
        path = bundle / f"{stage}_ctx.onnx"
        model = onnx.load(path)
        change(model)
        onnx.save(model, path)

    return edit


def _attribute(name: str, value: object) -> Callable[[onnx.ModelProto], object]:
    def change(model: onnx.ModelProto) -> None:
        (node,) = model.graph.node
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return change


PLANTED = {
    "a node outside": (
        _edit("context_1", lambda m: m.graph.node.append(onnx.helper.make_node("Identity", ["past_seq_len"], ["x"]))),
        "context_1_ctx.onnx: 1 nodes stand outside EPContext",
    ),
    "no node": (_edit("iterator_0", lambda m: m.graph.ClearField("node")), "iterator_0_ctx.onnx: no node at all"),
    "no binary": (lambda b: (b / BINARIES[1]).unlink(), f"its binary '{BINARIES[1]}' is no file of the bundle"),
    "a binary elsewhere": (
        _edit("context_0", _attribute("ep_cache_context", "../b/context_0_ctx_qnn.bin")),
        "is no file of the bundle",
    ),
    "a binary inside": (_edit("context_0", _attribute("embed_mode", 1)), "embed_mode is not 0"),
    "a binary of another part": (
        _edit("iterator_0", _attribute("ep_cache_context", BINARIES[1])),
        "part 0 has 2 binaries",
    ),
    "no SoC": (_edit("context_0", lambda m: m.ClearField("metadata_props")), "HTP arch and SoC model unknown"),
    "other inputs": (
        lambda b: shutil.copy(b / "context_1_ctx.onnx", b / "context_0_ctx.onnx"),
        "are not those of context_0.onnx",
    ),
}


@needs_compiler
@pytest.mark.parametrize("case", PLANTED)
def test_each_planted_fault_of_a_compiled_stage_is_named(case: str, compiled_copy: Path) -> None:
    change, words = PLANTED[case]
    assert lint_compiled(compiled_copy, "x-elite") == []
    change(compiled_copy)
    problems = lint_compiled(compiled_copy, "x-elite") + lint_bundle(compiled_copy)
    assert any(words in line for line in problems), problems


@needs_compiler
def test_doctor_compiles_anew_what_no_longer_fits(compiled_copy: Path, compiled: Path) -> None:
    """After an upgrade of the compiler and of onnxruntime-genai, and of a binary that was lost."""
    before = read_manifest(compiled)
    upgraded = replace(before, compiled=dict.fromkeys(before.compiled or (), "of another"))
    save_manifest(compiled_copy / "manifest.json", upgraded)
    (state,) = toolkit.doctor(compiled_copy).bundles
    assert [(row.problem, row.compiles) for row in state.ailments] == [
        ("its binaries are another compiler's than the one here", True)
    ]
    assert state.ailments[0].command == f"toolkit compile {compiled_copy}"
    older = {**before.versions, "onnxruntime_genai": "0.12.2"}
    save_manifest(compiled_copy / "manifest.json", replace(upgraded, versions=older))
    (compiled_copy / BINARIES[1]).unlink()
    done = called("doctor", str(compiled_copy), "--fix")
    assert done.returncode == 0, done.stdout
    assert f"  mended: {BINARIES[1]} is missing or has another size" in done.stdout and "FAIL" not in done.stdout
    assert "since it was made: onnxruntime-genai 0.12.2 to " in done.stdout
    assert read_manifest(compiled_copy).compiled == before.compiled and verify_manifest(compiled_copy) == []
    (compiled_copy / "transformer.onnx.data").unlink()
    (state,) = toolkit.doctor(compiled_copy, fix=True).bundles
    assert state.ailments[0].command.endswith("--force") and state.mended == ()


def test_what_doctor_cannot_mend_it_says(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = exports.copy(tmp_path / "b", "qnn")
    save_manifest(bundle / "manifest.json", replace(read_manifest(bundle), compiled={"context": "of another"}))
    monkeypatch.setattr("toolkit.pipeline.compile.htp_version", lambda: "9.9")
    monkeypatch.setattr(compiling, "free_memory_bytes", lambda: 1 << 20)
    done = called("doctor", str(tmp_path), "--fix")
    assert done.returncode == 1 and "  not mended: compiling part 1 of 1" in done.stdout
    assert f"  mend: toolkit compile {bundle}" in done.stdout


@needs_compiler
@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        (
            "os.kill(os.getpid(), signal.SIGSEGV)",
            BundleError,
            "onnxruntime-qnn crashed compiling part 2 of 2 "
            r"\(context_1 and iterator_1\) \(SIGSEGV\)",
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", MachineError, "part 2 of 2 .* ran out of memory .*was killed"),
        (
            "raise SystemExit('error: Failed to finalize QNN graph: QNN_COMMON_ERROR_MEM_ALLOC')",
            MachineError,
            "part 2 of 2 .* ran out of memory .*MEM_ALLOC",
        ),
        ("raise SystemExit('no licence')", BundleError, "did not compile part 2 of 2 .*: no licence"),
        ("raise SystemExit(0)", BundleError, "did not compile part 2 of 2"),
    ],
    ids=["crash", "killed", "out of memory", "refused", "silent"],
)
def test_a_childs_end_is_told_and_finished_parts_are_kept(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, what: str, kind: type[Exception], words: str
) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with monkeypatch.context() as patch:
        _plant(patch, what)
        with pytest.raises(kind, match=words) as said:
            compile_bundle(bundle)
    message, work = str(said.value), bundle.with_name("b.compile")
    assert "\n" not in message and "finished parts are kept" in message and str(work / "part_1.log") in message
    if "out of memory" in message or "crashed" in message:
        assert "toolkit compile" in message and "parts=4" in message
    # The bundle is what it was, and runs uncompiled.
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    first = (work / BINARIES[0]).stat()
    rows = compile_bundle(bundle)
    assert (bundle / BINARIES[0]).stat().st_mtime_ns == first.st_mtime_ns
    assert all(row.compiled for row in rows[1:5]) and not work.exists() and verify_manifest(bundle) == []


@needs_compiler
def test_a_finished_part_that_was_harmed_is_compiled_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = bundle.with_name("b.compile")
    with monkeypatch.context() as patch:
        _plant(patch, "os.kill(os.getpid(), signal.SIGKILL)")
        with pytest.raises(MachineError):
            compile_bundle(bundle)
    whole = (work / BINARIES[0]).read_bytes()
    (work / BINARIES[0]).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    steps: list[str] = []
    compile_bundle(bundle, steps.append)
    assert steps == ["compile part 1 of 2", "compile part 2 of 2"] and verify_manifest(bundle) == []


@needs_compiler
def test_a_graph_the_compiler_does_not_take_whole_is_refused(bundle: Path) -> None:
    path = bundle / "context_1.onnx"
    model = onnx.load(path, load_external_data=False)
    attention = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    attention.attribute.append(onnx.helper.make_attribute("smooth_softmax", 0))
    onnx.save(model, path)
    with pytest.raises(BundleError, match=r"did not compile part 2 of 2 .*fallback to CPU EP"):
        compile_bundle(bundle)


@needs_compiler
def test_nodes_left_outside_are_counted_in_the_compiled_file(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the compiler says: a child that makes such a file and reports success."""
    _put_in_place(monkeypatch, [sys.executable, "-c", LIAR])
    with pytest.raises(BundleError, match=r"context_0_ctx\.onnx has 1 nodes outside EPContext, such as /l/Relu \("):
        compile_bundle(bundle)


@needs_compiler
def test_a_kill_between_manifest_and_settings_is_seen_and_mended(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def failing(source: Any, to: Any) -> None:
        if Path(to) == bundle / "genai_config.json":
            raise KeyboardInterrupt
        replace(source, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(KeyboardInterrupt):
            compile_bundle(bundle)
    (problem,) = verify_manifest(bundle)
    assert problem.startswith("genai_config.json ")
    steps: list[str] = []
    compile_bundle(bundle, steps.append)
    assert steps == [] and verify_manifest(bundle) == [] and lint_bundle(bundle) == []


def test_too_little_memory_is_said_before_the_compiler_starts(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.pipeline.compile.htp_version", lambda: "2.7.0")
    _put_in_place(monkeypatch, ["no such program"])
    monkeypatch.setattr(compiling, "free_memory_bytes", lambda: 100 << 20)
    words = r"part 1 of 2 .* takes about 0\.3 GiB of memory and 0\.1 are free: close .*parts=4"
    with pytest.raises(MachineError, match=words):
        compile_bundle(bundle)


def test_a_target_without_a_compiler_is_refused(exports: Exports, tmp_path: Path) -> None:
    bundle = exports.copy(tmp_path / "b", "cpu-split")
    with pytest.raises(UnsupportedError, match=r"target cpu-split has no ahead-of-time compiler; .* have one: qnn"):
        compile_bundle(bundle)
    assert compile_exported(bundle, wanted=True) == ""


@pytest.mark.parametrize(
    ("machine", "version", "words"),
    [
        (("win32", "ARM64"), "2.7.0", "compiles for HTP on x86-64 Linux, this is"),
        (("linux", "aarch64"), "2.7.0", "compiles for HTP on x86-64 Linux, this is"),
        (("linux", "x86_64"), None, "onnxruntime-qnn is not installed: pip install onnxruntime-qnn"),
        (("linux", "x86_64"), "2.5.0", "onnxruntime-qnn 2.5.0 is known to be wrong: pip install 'onnxruntime-qnn>=2.6"),
    ],
)
def test_where_the_compiler_is_not_export_says_so_and_compile_refuses(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, machine: tuple[str, str], version: str | None, words: str
) -> None:
    def installed(package: str) -> str:
        if version is None:
            raise htp.importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(htp.sys, "platform", machine[0])
    monkeypatch.setattr(htp.platform, "machine", lambda: machine[1])
    monkeypatch.setattr(htp.importlib.metadata, "version", installed)
    with pytest.raises(MachineError, match=words):
        compile_bundle(bundle)
    with pytest.raises(MachineError, match=words):
        simulate(bundle, [1, 2], 1, np.zeros((2, 1024), np.float32))
    note = compile_exported(bundle, wanted=True)
    assert note.startswith("not compiled ahead of time: ") and "toolkit compile" in note
    reasons = {entry["name"]: entry["reason"] for entry in _report(bundle)["not_measured"]}
    assert reasons["partition.bin_bytes"].startswith("not compiled ahead of time: onnxruntime-qnn")


@needs_compiler
def test_export_compiles_unless_told_not_to(tmp_path: Path) -> None:
    words = ["export", "tiny-r1-qnn", "--no-validate", "--set", "soc=x2-elite"]
    words += ["--out", str(tmp_path / "b"), *SET_EIGHT_BITS]
    left = called(*words, "--no-compile")
    assert left.returncode == 0 and "note: not compiled ahead of time: left out by --no-compile" in left.stderr
    assert not list((tmp_path / "b").glob("*.bin"))
    done = called("compile", str(tmp_path / "b"), "--json")
    assert done.returncode == 0 and sum(row["compiled"] for row in json.loads(done.stdout)) == 2
    assert lint_compiled(tmp_path / "b", "x2-elite") == []
    made = called(*words, "--json")
    assert made.returncode == 0 and sum(row["compiled"] for row in json.loads(made.stdout)["partition"]) == 2
    assert called("check", str(tmp_path / "b")).returncode == 0


def test_fp32_is_compiled_on_request_alone(exports: Exports, tmp_path: Path) -> None:
    bundle = exports.copy(tmp_path / "b", "qnn", precision="fp32")
    assert "fp32 is for parity work" in compile_exported(bundle, wanted=True)


def test_the_plan_counts_the_binaries(tiny_r1: Path, tmp_path: Path) -> None:
    recipe, checkpoint = load_recipe("tiny-r1-qnn", ["parts=2", *EIGHT_BITS]), open_checkpoint(tiny_r1)
    whole, left = (plan_export(recipe, checkpoint, tmp_path / "b", precision) for precision in ("int4", "fp32"))
    weights = whole.layout.files["transformer.onnx.data"]
    assert whole.calibration_cost is not None
    beside = sum(whole.files.values()) + whole.calibration_cost.disk_bytes + (64 << 20)
    # A binary has the integers and little of their scales; norms are floats.
    units = [u for u in whole.layout.units.values() if u.slots[0].file == "transformer.onnx.data"]
    integers = sum(u.slots[0].nbytes if u.spec else sum(slot.nbytes for slot in u.slots) for u in units)
    assert 0.95 * weights < integers < weights
    assert whole.disk_needed_bytes - beside == pytest.approx(1.16 * integers, rel=1e-3)
    assert 250 << 20 < whole.compile_memory_bytes < (250 << 20) + 12.5 * weights and left.compile_memory_bytes == 0


@needs_compiler
def test_validate_measures_in_the_simulator(compiled_copy: Path) -> None:
    words = ["--no-tasks", "--no-speed", "--no-baseline", "--tokens", "80"]
    done = called("validate", str(compiled_copy), *words, "--simulate-tokens", "79")
    assert done.returncode == 0 and "beside the checkpoint on 79: mean KLD" in done.stdout, done.stderr
    report = _report(compiled_copy)
    assert 0 < report["simulator"]["hidden_rms_error"] < 0.02 and report["simulator"]["tokens"] == 2 * 32 + 8
    assert report["ceiling"] and sum(row["compiled"] for row in report["partition"]) == 4
    absent = {entry["name"]: entry["reason"] for entry in report["not_measured"]}
    assert not absent.keys() & {"simulator", "partition.bin_bytes", "partition.nodes_on_ep"}
    assert called("validate", str(compiled_copy), *words[:-1], "20", "--no-simulate").returncode == 0
    absent = {entry["name"]: entry["reason"] for entry in _report(compiled_copy)["not_measured"]}
    assert absent["simulator"] == "left out by --no-simulate"


@needs_compiler
def test_the_simulator_computes_what_the_cpu_computes(uncompiled: Path, tiny_r1: Path) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    # Text: random ids leave the ranges of uint16.
    ids = token_sequences(checkpoint, tiny_r1 / "arithmetic.jsonl", 72, 72)[0]
    (reference,) = reference_logits(checkpoint.config, checkpoint.source, [ids])
    found = simulate(uncompiled, ids, len(ids) - 4, reference)
    assert (found.ep, found.stage, found.parts) == ("QNNExecutionProvider", "transformer", 2)
    assert found.tokens == len(ids)
    assert 0 < found.hidden_rms_error < 0.02 and found.top1_agreement > 0.95
    on_cpu = Comparison()
    on_cpu.add(reference, open_positions(uncompiled, exact=True).logits(ids, len(ids) - 4), ids)
    assert found.mean_kld == pytest.approx(on_cpu.figures().mean_kld, rel=0.5, abs=1e-4)
    assert found.compared_tokens == len(ids)
    # Two texts in one pass through the simulator, window by window.
    half = len(ids) // 2
    halves, positions, on_cpu = [ids[:half], ids[half:]], open_positions(uncompiled, exact=True), Comparison()
    exact = reference_logits(checkpoint.config, checkpoint.source, halves)
    for some, logits in zip(halves, exact, strict=True):
        on_cpu.add(logits, positions.logits(some), some)
    windows = simulated_divergence(uncompiled, halves, exact)
    assert windows.compared_tokens == len(ids)
    assert windows.mean_kld == pytest.approx(on_cpu.figures().mean_kld, rel=0.5, abs=1e-4)


def test_the_simulators_error_is_the_hidden_states_own(uncompiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ORT's CPU kernels in the simulator's place it is 0; what is a tenth too large has an error of a tenth."""
    monkeypatch.setattr(simulator, "htp_version", lambda: "2.7.0")
    pipeline = simulator.Pipeline(uncompiled, exact=True)
    ids = some_ids(uncompiled, 70)
    steps = [step for step, _ in pipeline.stage_runs(ids, 130)]

    def exact(bundle: Path, stages: dict[str, str], runs: Any, hidden: Any) -> list[Any]:
        return [step.hidden for step in steps if step.stage in stages.values()]

    monkeypatch.setattr(simulator, "_run_apart", exact)
    logits = pipeline.logits(ids, 130)
    found = simulate(uncompiled, ids, 130, logits)
    assert found.hidden_rms_error == 0 and found.top1_agreement == 1
    assert found.mean_kld == pytest.approx(0, abs=1e-9) and found.reference_top1_agreement == 1
    monkeypatch.setattr(simulator, "_run_apart", lambda *args: [1.1 * array for array in exact(*args)])
    moved = simulate(uncompiled, ids, 130, logits)
    assert 0.09 < moved.hidden_rms_error < 0.12 and moved.mean_kld > 1e-4


@needs_compiler
def test_a_simulator_that_crashes_is_told(uncompiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _put_in_place(monkeypatch, [sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})"])
    with pytest.raises(BundleError, match=r"did not simulate context_0 and iterator_0 of .*exit code -11"):
        simulate(uncompiled, [1, 2, 3], 2, np.zeros((3, 1024), np.float32))


def test_the_ceiling_is_bandwidth_over_what_a_token_reads(uncompiled: Path) -> None:
    report = _report(uncompiled)
    (row,) = report["ceiling"]
    read = sum(r["bytes"] for r in report["quantization"]["by_role"] if r["role"] != "embed_tokens")
    assert row["weight_bytes_per_token"] == read and row["memory_bytes_per_s"] == SOCS["x-elite"].memory_bytes_per_s
    assert row["decode_tokens_per_s"] == pytest.approx(135e9 / read) and "not a measurement" in row["basis"]
