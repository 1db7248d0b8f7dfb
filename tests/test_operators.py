"""The operator table: every form fits its provider, and what does not fit is named."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from tests.graphs import WINDOW, recipe_for, write_graphs
from tests.random_models import CASES, make_checkpoint
from toolkit import names
from toolkit.bundle import operators
from toolkit.bundle.operators import Placement, bundle_placements, placement_of, support_of
from toolkit.errors import BundleError
from toolkit.graph.interface import GraphInterface, ValueType, interface_of, read_inputs, read_interface
from toolkit.target import CPU_EP, TARGETS, Stage

FAMILIES = ("qwen2", "llama", "qwen3")
TYPES = {"float32": "FLOAT", "float64": "DOUBLE"}
DTYPES = {"float32", "float16", "bfloat16", "int32", "int64", "bool", "uint8"}
KEYS = {field.name for field in fields(operators.OperatorSupport)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One per family; DirectML wants whole blocks, so the width is a multiple of one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for case in FAMILIES:
        family, extra = CASES[case]
        make_checkpoint(family, {**extra, "intermediate_size": 128}, folder / case)
    return folder


@pytest.fixture(scope="module")
def made(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """family/target: quantized graphs."""
    folder = tmp_path_factory.mktemp("made")
    for family in FAMILIES:
        (folder / family).mkdir()
        for target in TARGETS:
            write_graphs(checkpoints / family, folder / family / target, target, recipe_for(target))
    return folder


def _stage(target: str) -> Stage:
    """The one whose nodes are the target's own provider's."""
    return TARGETS[target].stages(WINDOW)[1 if TARGETS[target].partitioned else 0]


def _value(name: str, dtype: str, shape: tuple[int | str, ...]) -> ir.Value:
    kind = ir.TensorType(ir.DataType[TYPES.get(dtype, dtype.upper())])
    return ir.Value(name=name, type=kind, shape=ir.Shape(shape))


def _node(operator: str, inputs: list[ir.Value | None], outputs: int = 1, **attributes: Any) -> ir.Node:
    domain, _, op_type = operator.rpartition(":")
    made = [ir.Value(name=f"{op_type}.{k}") for k in range(outputs)]
    return ir.node(op_type, inputs, attributes, domain=domain, outputs=made, name=op_type)


def _graph(given: list[ir.Value], nodes: list[ir.Node], opset: int = 21) -> ir.Model:
    ends = [nodes[-1].outputs[0]]
    return ir.Model(ir.Graph(given, ends, nodes=nodes, opset_imports={"": opset, "com.microsoft": 1}), ir_version=10)


def _one(operator: str, dtypes: str = "float32", opset: int = 21, dim: int | str = 4, **attributes: Any) -> ir.Model:
    """A graph of one node; `-` is an input left out."""
    inputs = [None if dtype == "-" else _value(f"x{k}", dtype, (1, dim)) for k, dtype in enumerate(dtypes.split())]
    return _graph([x for x in inputs if x is not None], [_node(operator, inputs, **attributes)], opset)


def _placed(target: str, model: ir.Model) -> Placement:
    return placement_of(interface_of(model), _stage(target))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_fits_its_provider(family: str, target: str, made: Path) -> None:
    placements = bundle_placements(made / family / target, target, WINDOW)
    assert [p.stage for p in placements] == [stage.name for stage in TARGETS[target].stages(WINDOW)]
    for placement in placements:
        own = placement.stage == _stage(target).name or placement.stage == names.ITERATOR
        assert placement.execution_provider == (_stage(target).execution_provider if own else CPU_EP)
        graph = read_interface(made / family / target / placement.file)
        assert placement.nodes == len(graph.nodes) > 0
        # Embedding and LM head, or what computes lengths, stay on the CPU inside one graph.
        outside = Counter(node.annotation for node in graph.nodes)[names.OUTSIDE_ANNOTATION]
        assert placement.nodes_outside == outside and (outside > 0) == (target in ("dml", "webgpu"))
        # QNN compiles attention only where it is told to.
        assert bool(placement.conditions) == (target == "qnn" and own)
        if target == "vitisai" and family == "qwen3" and own:
            # q and k norm, each between two reshapes, in two layers.
            (problem,) = placement.problems
            assert problem.startswith(f"{placement.file}: Reshape is not among its operators, for 8 nodes such as ")
            assert placement.nodes_legal == placement.nodes - 8
        else:
            assert placement.problems == ()
            assert placement.nodes_legal + placement.nodes_outside == placement.nodes


@pytest.mark.parametrize("family", FAMILIES)
# The float product of VitisAI has no row: its recipes quantize every matrix.
@pytest.mark.parametrize("target", [target for target in TARGETS if target != "vitisai"])
def test_unquantized_forms_fit_too(family: str, target: str, checkpoints: Path, tmp_path: Path) -> None:
    write_graphs(checkpoints / family, tmp_path, target)
    assert [p.problems for p in bundle_placements(tmp_path, target, WINDOW) if p.problems] == []


# The form of one target under another's provider, and words of every line it brings; nothing else may be named.
FOREIGN: dict[tuple[str, str], list[str]] = {
    ("cpu", "dml"): [
        "com.microsoft:GatherBlockQuantized is not among its operators, for 1 node such as",
        "com.microsoft:GroupQueryAttention is taken with do_rotary 0, not 1, for 2 nodes",
        "RMSNormalization is not among its operators, for 1 node such as",
        "com.microsoft:MatMulNBits is taken with 4 inputs at most, not ",
        "Cast is taken in float32 or float16 or int32 or int64 or bool, not in bfloat16, for 12 nodes such as",
        "opset 23, DmlExecutionProvider's table is for 21 to 21",
    ],
    ("cpu-split", "qnn"): [
        "com.microsoft:SkipSimplifiedLayerNormalization is not among its operators, for 4 nodes",
        "com.microsoft:MatMulNBits is taken with 4 inputs at most, not ",
        "Cast is taken in ",
        "input past_key_values.0.key has no fixed shape, which QNNExecutionProvider needs",
    ],
    ("vitisai", "openvino"): ["com.microsoft:GroupQueryAttention is not among its operators, for 2 nodes such as"],
    ("qnn", "openvino"): [
        "com.microsoft:GroupQueryAttention is not among its operators, for 2 nodes such as",
        "RMSNormalization is not among its operators, for 5 nodes such as",
    ],
    ("qnn", "vitisai"): [
        "RMSNormalization is not among its operators, for 5 nodes such as",
        "opset 23, VitisAIExecutionProvider's table is for 21 to 21",
    ],
    ("openvino", "vitisai"): [
        *(
            f": {operator} is not among its operators"
            for operator in (
                "Reshape",
                "Sub",
                "Gather",
                "GreaterOrEqual",
                "Less",
                "And",
                "Max",
                "Min",
                "Transpose",
                "Split",
                "Concat",
                "Where",
                "LessOrEqual",
                "MatMul",
                "Softmax",
                "Cast",
            )
        ),
        ": Add is taken in float32 or float16, not in int64",
    ],
}


@pytest.mark.parametrize("pair", FOREIGN, ids="-under-".join)
def test_a_form_under_another_provider_is_named(pair: tuple[str, str], made: Path) -> None:
    form, provider = pair
    graph = read_interface(made / "qwen2" / form / _stage(form).file)
    placement = placement_of(graph, _stage(provider))
    for words in FOREIGN[pair]:
        assert sum(words in line for line in placement.problems) == 1, (words, placement.problems)
    assert len(placement.problems) == len(FOREIGN[pair]), placement.problems
    assert placement.nodes_legal < placement.nodes and placement.nodes_outside == 0


MATMUL: dict[str, Any] = {"K": 64, "N": 64, "bits": 4, "block_size": 32}
GQA = "com.microsoft:GroupQueryAttention"
NBITS = "com.microsoft:MatMulNBits"
WITH_BIAS = "float16 uint8 float16 uint8 int32 float16"
PLANTED: dict[str, tuple[str, ir.Model, str]] = {
    "rotary inside": ("dml", _one(GQA, "float16", do_rotary=1), "is taken with do_rotary 0, not 1"),
    "a sliding window for DirectML": (
        "dml",
        _one(GQA, "float16", local_window_size=8),
        "is taken with local_window_size -1, not 8",
    ),
    "a sliding window for QNN": (
        "qnn",
        _one(GQA, "float16", local_window_size=8),
        "is taken with local_window_size -1, not 8",
    ),
    "a bias for DirectML": ("dml", _one(NBITS, WITH_BIAS, **MATMUL), "is taken with 4 inputs at most, not 6"),
    "a bias for QNN": ("qnn", _one(NBITS, WITH_BIAS, **MATMUL), "is taken with 4 inputs at most, not 6"),
    "part of a block for QNN": (
        "qnn",
        _one(NBITS, **{**MATMUL, "K": 112}),
        "needs a block_size that divides K 112, not 32",
    ),
    "part of a block": (
        "dml",
        _one(NBITS, "float16 uint8 float16", **{**MATMUL, "K": 112}),
        "needs a block_size that divides K 112, not 32",
    ),
    "8 bits": ("vitisai", _one(NBITS, **{**MATMUL, "bits": 8}), "is taken with bits 4, not 8"),
    "blocks of 16": (
        "vitisai",
        _one(NBITS, **{**MATMUL, "block_size": 16}),
        "is taken with block_size 32 or 64 or 128, not 16",
    ),
    "2 bits for DirectML": ("dml", _one(NBITS, **{**MATMUL, "bits": 2}), "is taken with bits 4 or 8, not 2"),
    "a fused norm": ("qnn", _one("com.microsoft:SkipSimplifiedLayerNormalization"), "is not among its operators"),
    "a new norm": ("openvino", _one("RMSNormalization", opset=23), "is not among its operators"),
    "attention for OpenVINO": ("openvino", _one(GQA, "float16"), "is not among its operators"),
    "an embedding for QNN": (
        "qnn",
        _one("com.microsoft:GatherBlockQuantized", "uint8 int64 float16"),
        "is not among its operators",
    ),
    "an axis of the embedding": (
        "cpu",
        _one("com.microsoft:GatherBlockQuantized", "uint8 int64 float32", quantize_axis=0),
        "is taken with quantize_axis 1, not 0",
    ),
    "doubles": ("cpu", _one("Mul", "float64"), "is taken in float32 or float16 or int32 or int64, not in float64"),
    "bytes": ("openvino", _one("Add", "int8"), "is taken in float32 or float16 or int32 or int64 or bool, not in int8"),
    "whole numbers": ("qnn", _one("Add", "int64 int64"), "is taken in float32 or float16, not in int64"),
    "a half on the CPU": ("cpu", _one("ReduceSum", "float16"), "is taken in float32 or int32 or int64, not in float16"),
    "an unknown dtype": ("cpu", _one("Mul", "-"), "is taken in float32 or float16 or int32 or int64, not in ?"),
    "another domain": ("cpu", _one("com.acme:Add"), "is not among its operators"),
    # The value that means nothing is refused too.
    "smooth softmax": ("qnn", _one(GQA, "float16", smooth_softmax=0), "is not taken with smooth_softmax written"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_each_planted_node_is_named(case: str) -> None:
    target, model, words = PLANTED[case]
    (node,) = model.graph
    placement = _placed(target, model)
    operator = f"{node.domain}:{node.op_type}" if node.domain else node.op_type
    line = f"{_stage(target).file}: {operator} {words}, for 1 node such as {node.name}"
    assert placement.problems == (line,)
    assert (placement.nodes, placement.nodes_legal, placement.nodes_outside) == (1, 0, 0)


TAKEN: dict[str, tuple[str, ir.Model]] = {
    "no rotary": ("dml", _one(GQA, "float16", do_rotary=0, local_window_size=-1)),
    "rotary by default": ("dml", _one(GQA, "float16")),
    "rotary for QNN": ("qnn", _one(GQA, "float16", do_rotary=1)),
    "a sliding window for the CPU": ("cpu", _one(GQA, local_window_size=8)),
    "zero points": ("dml", _one(NBITS, "float16 uint8 float16 uint8", **MATMUL)),
    "a bias for the CPU": ("cpu", _one(NBITS, WITH_BIAS.replace("float16", "float32"), **MATMUL)),
    # Elsewhere the last block may be short.
    "part of a block": ("openvino", _one(NBITS, **{**MATMUL, "K": 112})),
    "2 bits": ("qnn", _one(NBITS, **{**MATMUL, "bits": 2})),
    "a new norm": ("qnn", _one("RMSNormalization", opset=23)),
    "an embedding": ("cpu", _one("com.microsoft:GatherBlockQuantized", "uint8 int64 float32", bits=4)),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_a_provider_takes_is_no_problem(case: str) -> None:
    placement = _placed(*TAKEN[case])
    assert placement.problems == () and placement.nodes_legal == placement.nodes == 1


@pytest.mark.parametrize(
    ("target", "model", "expected"),
    [
        ("qnn", _one("Add", dim="sequence"), "input x0 has no fixed shape, which QNNExecutionProvider needs"),
        ("openvino", _one("Add", dim="sequence"), "input x0 has no fixed shape, which OpenVINOExecutionProvider"),
        ("vitisai", _one("Add", dim="sequence"), "input x0 has no fixed shape, which VitisAIExecutionProvider"),
        ("dml", _one("Add", dim="sequence"), ""),
        ("cpu", _one("Add", dim="sequence"), ""),
        ("dml", _one("Add", opset=23), "opset 23, DmlExecutionProvider's table is for 21 to 21"),
        ("vitisai", _one("Add", opset=20), "opset 20, VitisAIExecutionProvider's table is for 21 to 21"),
        ("cpu", _one("Add", opset=24), "opset 24, CPUExecutionProvider's table is for 21 to 23"),
        ("qnn", _one("Add", opset=24), ""),
        ("qnn", _one("Add", opset=25), "opset 25, QNNExecutionProvider's table is for 21 to 24"),
    ],
)
def test_shapes_and_opset_of_a_graph(target: str, model: ir.Model, expected: str) -> None:
    placement = _placed(target, model)
    assert len(placement.problems) == bool(expected)
    assert all(line.startswith(f"{_stage(target).file}: {expected}") for line in placement.problems)
    # The node itself is taken.
    assert placement.nodes_legal == 1


def test_nodes_of_one_kind_share_a_line_and_annotated_ones_are_the_cpus() -> None:
    x = _value("x", "float32", (1, 4))
    nodes = [_node("Softmax", [x]), _node("Softmax", [x]), _node("Add", [x, x]), _node("Softmax", [x])]
    for name, node in zip("abcd", nodes, strict=True):
        node.name = name
    # DirectML's row has no Softmax, the CPU's has.
    nodes[3].metadata_props["layer_ann"] = names.OUTSIDE_ANNOTATION
    placement = _placed("dml", _graph([x], nodes))
    assert placement.problems == ("model.onnx: Softmax is not among its operators, for 2 nodes such as a",)
    assert (placement.nodes, placement.nodes_legal, placement.nodes_outside) == (4, 1, 1)


def test_an_annotated_node_must_be_one_of_the_cpus() -> None:
    x = _value("x", "float64", (1, 4))
    node = _node("Add", [x, x])
    node.metadata_props["layer_ann"] = names.OUTSIDE_ANNOTATION
    (problem,) = _placed("dml", _graph([x], [node])).problems
    assert "Add is taken in float32 or float16 or int32 or int64, not in float64" in problem


def test_a_condition_is_no_problem_and_said_once() -> None:
    x = _value("x", "float16", (1, 4))
    placement = _placed("qnn", _graph([x], [_node(GQA, [x], do_rotary=1), _node("Add", [x, x]), _node(GQA, [x])]))
    assert placement.problems == () and placement.nodes_legal == 3
    (condition,) = placement.conditions
    assert condition.startswith(f"context.onnx: {GQA} is taken only when compiled with")
    assert _placed("qnn", _one("Add")).conditions == ()


def test_a_missing_stage_is_left_to_the_linter_and_a_broken_one_refused(tmp_path: Path) -> None:
    assert bundle_placements(tmp_path, "qnn", WINDOW) == []
    (tmp_path / "embeddings.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"embeddings\.onnx is not an ONNX graph"):
        bundle_placements(tmp_path, "qnn", WINDOW)


@pytest.fixture(scope="module")
def flow() -> GraphInterface:
    """Each operator whose output has another dtype than its first input, and one node after it to see which."""
    x = _value("x", "float32", (1, "sequence"))
    ids = _value("ids", "int64", ("batch", 3))
    codes = ir.Value(name="codes", const_value=ir.tensor([[1, 2]], dtype=ir.DataType.UINT8))
    scales = ir.Value(name="scales", const_value=ir.tensor([[0.5]], dtype=ir.DataType.FLOAT16))
    cast = _node("Cast", [x], to=ir.DataType.FLOAT16.value)
    shape = _node("Shape", [x])
    less = _node("Less", [ids, ids])
    where = _node("Where", [less.outputs[0], cast.outputs[0], cast.outputs[0]])
    rows = _node("com.microsoft:GatherBlockQuantized", [codes, ids, scales], bits=4)
    top = _node("ArgMax", [x])
    split = _node("Split", [cast.outputs[0]], outputs=2, num_outputs=2)
    doubled = _node("Cast", [ids], to=ir.DataType.DOUBLE.value)
    skipped = _node("Clip", [x, None, x], mode="none", axes=[1])
    nodes = {
        "cast": cast,
        "shape": shape,
        "less": less,
        "where": where,
        "rows": rows,
        "top": top,
        "split": split,
        "doubled": doubled,
        "skipped": skipped,
    }
    for name in tuple(nodes):
        nodes[f"after {name}"] = _node("Identity", [nodes[name].outputs[-1]])
    for number, (name, node) in enumerate(nodes.items()):
        node.name = name
        for k, output in enumerate(node.outputs):
            output.name = f"v{number}.{k}"
    graph = ir.Graph(
        [x, ids],
        [where.outputs[0]],
        nodes=list(nodes.values()),
        initializers=[codes, scales],
        opset_imports={"": 21, "com.microsoft": 1},
    )
    where.outputs[0].type, where.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT16), ir.Shape((1, 3))
    return interface_of(ir.Model(graph, ir_version=10))


# The dtype that decides a node's kernel, and the one it makes.
FLOW = {
    "cast": ("float32", "float16"),
    "shape": ("float32", "int64"),
    "less": ("int64", "bool"),
    "where": ("float16", "float16"),
    "rows": ("float16", "float16"),
    "top": ("float32", "int64"),
    "split": ("float16", "float16"),
    "doubled": ("int64", "float64"),
    "skipped": ("float32", "float32"),
}


@pytest.mark.parametrize("name", FLOW)
def test_dtypes_flow_through_a_graph(name: str, flow: GraphInterface) -> None:
    dtypes = {node.name: node.dtype for node in flow.nodes}
    assert (dtypes[name], dtypes[f"after {name}"]) == FLOW[name]


@pytest.mark.parametrize("operator", ["And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not"])
def test_comparisons_make_bools(operator: str) -> None:
    x = _value("x", "bool" if operator in ("And", "Not") else "int32", (1,))
    first = _node(operator, [x] if operator == "Not" else [x, x])
    _, after = interface_of(_graph([x], [first, _node("Cast", [first.outputs[0]], to=1)])).nodes
    assert after.dtype == "bool"


def test_inputs_alone_are_those_of_the_interface(made: Path, tmp_path: Path) -> None:
    paths = [*made.rglob("*.onnx"), tmp_path / "odd.onnx"]
    odd = [
        onnx.helper.make_tensor_value_info("past.key", onnx.TensorProto.FLOAT16, (None, 2, "length", 0)),
        onnx.helper.make_tensor_value_info("scalar", onnx.TensorProto.INT64, ()),
        onnx.helper.make_tensor_value_info("shapeless", onnx.TensorProto.UINT8, None),
    ]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", odd, [])), paths[-1])
    assert len(paths) > 10
    for path in paths:
        assert read_inputs(path) == read_interface(path).inputs != {}, path
    for content in (b"no graph at all", paths[0].read_bytes()[:-1]):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(BundleError, match="is not an ONNX graph"):
            read_inputs(tmp_path / "bad.onnx")


def test_an_interface_tells_types_shapes_and_nodes(flow: GraphInterface) -> None:
    assert flow.inputs == {"x": ValueType("FLOAT", (1, "sequence")), "ids": ValueType("INT64", ("batch", 3))}
    assert list(flow.outputs.values()) == [ValueType("FLOAT16", (1, 3))]
    assert flow.opset == 21
    assert flow.operators() == {
        "ArgMax": 1,
        "Cast": 2,
        "Clip": 1,
        "GatherBlockQuantized": 1,
        "Identity": 9,
        "Less": 1,
        "Shape": 1,
        "Split": 1,
        "Where": 1,
    }
    nodes = {node.name: node for node in flow.nodes}
    assert nodes["rows"].operator == "com.microsoft:GatherBlockQuantized" and nodes["less"].operator == "Less"
    assert nodes["rows"].inputs == 3 and nodes["rows"].attributes == {"bits": 4}
    # Lists of numbers decide no kernel here.
    assert nodes["skipped"].attributes == {"mode": "none"}


def test_annotations_survive_the_file(made: Path) -> None:
    nodes = read_interface(made / "qwen2" / "dml" / "model.onnx").nodes
    outside = {node.operator.rpartition(":")[2] for node in nodes if node.annotation == names.OUTSIDE_ANNOTATION}
    assert outside == {"GatherBlockQuantized", "Cast", "MatMulNBits"}
    assert {node.annotation for node in nodes} == {"", names.OUTSIDE_ANNOTATION}


@pytest.mark.parametrize("provider", sorted({row.accelerator.execution_provider for row in TARGETS.values()}))
def test_every_provider_of_a_target_has_a_row_with_its_source(provider: str) -> None:
    row = support_of(provider)
    low, high = row.opset
    assert row.source.strip() and 1 <= low <= high and row.operators


def test_every_row_of_the_table_is_well_formed() -> None:
    table = json.loads(operators._TABLE.read_text(encoding="utf-8"))
    assert set(table) == {CPU_EP} | {row.accelerator.execution_provider for row in TARGETS.values()}
    for provider, support in table.items():
        assert set(support) == {"source", "checked_by", "static", "opset", "operators"}, provider
        assert list(support["operators"]) == sorted(support["operators"]), provider
        for operator, row in support["operators"].items():
            place = f"{provider}: {operator}"
            # A misspelt key would allow what it means to forbid.
            assert set(row) <= KEYS, place
            assert row["types"] and set(row["types"]) <= DTYPES and len(set(row["types"])) == len(row["types"]), place
            assert all(allowed for allowed in row.get("attributes", {}).values()), place


@pytest.mark.parametrize("target", TARGETS)
def test_every_targets_opset_is_in_its_row(target: str) -> None:
    low, high = support_of(_stage(target).execution_provider).opset
    cpu_low, cpu_high = support_of(CPU_EP).opset
    assert max(low, cpu_low) <= TARGETS[target].form.opset <= min(high, cpu_high)
