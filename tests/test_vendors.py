"""The accelerators' stages in their vendors' own software: the openvino package, and QNN's compiler and simulator."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import onnx
import pytest

from tests.command_line import called
from tests.exports import Exports
from tests.graphs import WINDOW, recipe_for, write_graphs
from tests.random_models import CASES, make_checkpoint
from toolkit.bundle.operators import bundle_placements
from toolkit.errors import BundleError, MachineError
from toolkit.evaluate import webgpu
from toolkit.evaluate.vendors import MAX_ERROR, run_vendor_apart
from toolkit.recipe import QuantRule
from toolkit.target import TARGETS

WEBGPU = TARGETS["webgpu"].accelerator.execution_provider
NEEDS = {"openvino": "openvino", "qnn": "onnxruntime_qnn"}
PROVIDERS = {"openvino": "OpenVINOExecutionProvider", "qnn": "QNNExecutionProvider"}


@pytest.fixture(params=NEEDS)
def target(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    return name


@pytest.mark.parametrize("case", ["qwen2", "llama-llama3", "qwen3"])
@pytest.mark.parametrize("quantized", [True, False], ids=["int4", "float"])
def test_vendors_software_computes_what_ort_computes(target: str, case: str, quantized: bool, tmp_path: Path) -> None:
    make_checkpoint(*CASES[case], tmp_path)
    # HTP takes whole blocks alone, and 112 wide matrices are among these.
    rules = (QuantRule("*", block_size=16, symmetric=target == "openvino"),)
    write_graphs(tmp_path, tmp_path / target, target, recipe_for(target, rules) if quantized else None)
    context, iterator = run_vendor_apart(tmp_path / target, PROVIDERS[target])
    assert (context.file, iterator.file) == ("context.onnx", "iterator.onnx")
    assert 0 < context.error <= MAX_ERROR and 0 < iterator.error <= MAX_ERROR
    # With fallback to the CPU disabled, QNN says that it took every node.
    expected = {"QNNExecutionProvider"} if target == "qnn" else set()
    assert context.nodes.keys() == iterator.nodes.keys() == expected


def test_a_node_that_qnn_does_not_take_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    make_checkpoint(*CASES["qwen2"], tmp_path)
    write_graphs(tmp_path, tmp_path / "qnn", "qnn", recipe_for("qnn"))
    path = tmp_path / "qnn" / "context.onnx"
    model = onnx.load(path, load_external_data=False)
    attention = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    attention.attribute.append(onnx.helper.make_attribute("smooth_softmax", 0))
    onnx.save(model, path)
    with pytest.raises(BundleError, match="onnxruntime-qnn did not run the stages"):
        run_vendor_apart(tmp_path / "qnn", "QNNExecutionProvider")


def test_the_table_knows_that_htp_takes_whole_blocks_alone(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    make_checkpoint(*CASES["qwen2"], tmp_path)
    write_graphs(tmp_path, tmp_path / "qnn", "qnn", recipe_for("qnn"))
    _, context, *_ = bundle_placements(tmp_path / "qnn", "qnn", WINDOW)
    assert [line.count("needs a block_size that divides K 112, not 32") for line in context.problems] == [1]
    with pytest.raises(BundleError, match="fallback to CPU EP"):
        run_vendor_apart(tmp_path / "qnn", "QNNExecutionProvider")


def test_a_provider_without_software_here_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="DmlExecutionProvider cannot be run here"):
        run_vendor_apart(tmp_path, "DmlExecutionProvider")


def test_check_runs_the_stages_on_request(exports: Exports, target: str) -> None:
    done = called(
        "check",
        str(exports(target, ("quality=fast", "bits_per_weight=0", "context_length=256", "window=32"))),
        "--run",
        "--json",
    )
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["passed"] and len(found["runs"]) == 2
    assert [stage["nodes_legal"] == stage["nodes"] for stage in found["stages"]] == [True] * 4


@pytest.fixture
def webgpu_graph(tmp_path: Path) -> Path:
    """A small quantized graph, where its provider and something that computes are here."""
    pytest.importorskip("onnxruntime_ep_webgpu")
    if not any((Path(folder) / webgpu.DRIVER).is_file() for folder in webgpu.BROWSERS):
        pytest.skip("no browser brings a Vulkan in software")
    make_checkpoint(*CASES["qwen2"], tmp_path)
    write_graphs(tmp_path, tmp_path / "webgpu", "webgpu", recipe_for("webgpu", (QuantRule("*", block_size=32),)))
    return tmp_path / "webgpu"


def test_webgpu_computes_what_ort_computes(webgpu_graph: Path) -> None:
    """In the provider itself, every node but those of lengths, which are marked for the CPU."""
    (run,) = run_vendor_apart(webgpu_graph, WEBGPU)
    assert run.file == "model.onnx" and 0 < run.error < 1e-4
    assert run.nodes.keys() == {WEBGPU} and run.nodes[WEBGPU] > 20
    path = webgpu_graph / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        del node.metadata_props[:]
    onnx.save(model, path)
    (run,) = run_vendor_apart(webgpu_graph, WEBGPU)
    assert run.nodes["CPUExecutionProvider"] == 11


def test_webgpu_without_an_adapter_is_one_line(webgpu_graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VK_DRIVER_FILES", str(webgpu_graph / "none.json"))
    with pytest.raises(
        BundleError, match=r"onnxruntime-ep-webgpu did not run .*: no GPU and no Vulkan in software: ins"
    ):
        run_vendor_apart(webgpu_graph, WEBGPU)
