"""A traced decoder, without tracing one: graphs as torch's exporter writes them, and what is refused before one is.

tests/slow/test_traced_families.py traces families of transformers.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

import toolkit
from toolkit import names
from toolkit.algorithms import MatrixUse
from toolkit.checkpoint.any_decoder import open_any_decoder
from toolkit.errors import CheckpointError, MachineError, RecipeError, ToolkitError, UnsupportedError
from toolkit.graph.interface import interface_of
from toolkit.graph.traced import build_traced, plan_traced_layout, read_traced
from toolkit.partition.data_files import Destination
from toolkit.partition.pack import pack_weights
from toolkit.partition.stored import StoredTensors
from toolkit.pipeline import traced as pipeline_traced
from toolkit.recipe import Recipe, load_recipe, sized
from toolkit.target import TARGETS
from toolkit.trace import traced as trace_room
from toolkit.trace.traced import TracedFacts

V, D, WIDE = 96, 64, 80
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed.weight": (V, D),
    "model.up.weight": (WIDE, D),
    "model.gain.weight": (WIDE,),
    "model.down.weight": (D, WIDE),
    "model.mixed.weight": (D, D),
}


def _value(name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _traced(odd: str = "") -> ir.Model:
    """A graph as torch writes one: a tied table, two linears, a matrix that is no product's second factor, and a cache
    of one layer. `odd` is an operator that stands before the head."""
    weights = {
        name: ir.Value(
            name=name,
            const_value=ir.ExternalTensor("none", 0, 0, ir.DataType.FLOAT, shape=ir.Shape(shape), name=name),
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape(shape),
        )
        for name, shape in SHAPES.items()
    }
    scale = ir.Value(name="scale", const_value=ir.tensor(np.array(0.5, np.float32), name="scale"))
    ids, mask, positions = (
        _value(name, ir.DataType.INT64, ("batch", length))
        for name, length in ((names.INPUT_IDS, "s"), (names.ATTENTION_MASK, "t"), (names.POSITION_IDS, "s"))
    )
    past = [_value(n, ir.DataType.FLOAT, ("batch", 1, "p", D)) for n in (names.past_key(0), names.past_value(0))]
    nodes: list[ir.Node] = []

    def op(kind: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        nodes.append(ir.node(kind, inputs, attributes, name=f"node_{len(nodes)}"))
        made = nodes[-1].outputs[0]
        made.name = f"val_{len(nodes)}"
        return made

    def linear(x: ir.Value, weight: str) -> ir.Value:
        return op("MatMul", [x, op("Transpose", [weights[weight]], perm=[1, 0])])

    x = op("Gather", [weights["model.embed.weight"], ids])
    hidden = op("Mul", [linear(x, "model.up.weight"), weights["model.gain.weight"]])
    hidden = op("Add", [linear(hidden, "model.down.weight"), op("MatMul", [x, weights["model.mixed.weight"]])])
    axis = ir.Value(name="axis", const_value=ir.tensor(np.array([1], np.int64), name="axis"))
    row = op("Unsqueeze", [hidden, axis])
    present = [op("Concat", [given, row], axis=2) for given in past]
    hidden = op(odd, [hidden]) if odd else hidden
    logits = op("Mul", [linear(hidden, "model.embed.weight"), scale])
    outputs = zip([logits, *present], (names.LOGITS, names.present_key(0), names.present_value(0)), strict=True)
    for made, name in outputs:
        made.name, made.type = name, ir.TensorType(ir.DataType.FLOAT)
        made.shape = ir.Shape(("batch", "s", V) if name == names.LOGITS else ("batch", 1, "q", D))
    graph = ir.Graph(
        [ids, mask, positions, *past],
        [logits, *present],
        nodes=nodes,
        initializers=[*weights.values(), scale, axis],
        opset_imports={"": 23},
    )
    return ir.Model(graph, ir_version=10)


def _config(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": D, "n_layer": 1, "num_attention_heads": 1, "intermediate_size": WIDE, "vocab_size": V}
    return {"model_type": "unheard_of", "n_positions": 64, "eos_token_id": 2, **sizes, **more}


def _checkpoint(folder: Path, **more: Any) -> Path:
    """Its embedding is called as a model saved without its head's wrapper calls it."""
    from safetensors.numpy import save_file

    folder.mkdir()
    generator = np.random.default_rng(0)
    tensors = {name: generator.normal(0, 0.3, shape).astype(np.float32) for name, shape in SHAPES.items()}
    tensors["embed.weight"] = tensors.pop("model.embed.weight")
    tensors["beside.weight"] = np.ones(3, np.float32)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_config(**more)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("traced") / "small")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graph above stands for what torch would trace; the list may hold an operator for it."""
    odd: list[str] = []

    def trace(folder: Path, graph: Path, model_type: str) -> TracedFacts:
        ir.save(_traced(*odd), graph)
        return TracedFacts(SHAPES, {name: (name.removeprefix("model."),) for name in SHAPES})

    monkeypatch.setattr(pipeline_traced, "trace_decoder", trace)
    return odd


def _recipe(checkpoint: Path) -> Recipe:
    return load_recipe("cpu", ["quality=fast"], str(checkpoint))


def test_what_a_matrix_is_for_is_seen_in_the_graph() -> None:
    traced = read_traced(_traced(), SHAPES, {name: name for name in SHAPES})
    assert traced.uses == {
        "model.embed.weight": MatrixUse.TIED_EMBEDDING,
        "model.up.weight": MatrixUse.LINEAR,
        "model.down.weight": MatrixUse.LINEAR,
    }


def test_packed_products_are_those_of_the_stored_weights_and_the_head_reads_the_last_token(
    checkpoint: Path, planted: list[str], tmp_path: Path
) -> None:
    """The oracle multiplies what lies in the data file; rows of two lengths, and a cache that is there already."""
    (plan,) = toolkit.plan("cpu", checkpoint=checkpoint, trace=True)
    pack_weights(plan.checkpoint.source, [Destination(plan.layout, tmp_path)])
    assert plan.traced is not None
    plan.traced.save(tmp_path)
    operators = interface_of(plan.traced.model).operators()
    assert {name: operators.get(name, 0) for name in ("MatMulNBits", "GatherBlockQuantized", "MatMul", "Gather")} == {
        "MatMulNBits": 3,
        "GatherBlockQuantized": 1,
        "MatMul": 1,
        "Gather": 0,
    }
    stored = StoredTensors(plan.layout, tmp_path)
    for node in plan.traced.model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    plan.traced.save(tmp_path)
    ids, mask = np.array([[5, 7, 11], [3, 8, 0]]), np.array([[1] * 5, [1, 1, 1, 1, 0]])
    cache = np.random.default_rng(1).normal(size=(2, 1, 2, D)).astype(np.float32)
    feeds = {"input_ids": ids, "attention_mask": mask, "past_key_values.0.key": cache, "past_key_values.0.value": cache}
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    feeds = {name: array for name, array in {**feeds, "position_ids": ids}.items() if name in wanted}
    logits, present, _ = session.run(None, feeds)
    hidden = _hidden(stored, ids)
    expected = 0.5 * hidden[[0, 1], [2, 1]] @ stored.read("embed.weight").T
    assert np.abs(logits[:, 0] - expected).max() < 1e-4 < np.abs(expected).max()
    assert np.abs(present[:, 0] - np.concatenate([cache[:, 0], hidden], axis=1)).max() < 1e-4


def _hidden(stored: StoredTensors, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    x = stored.read("embed.weight")[ids]
    wide = (x @ stored.read("model.up.weight").T) * stored.read("model.gain.weight")
    return np.asarray(wide @ stored.read("model.down.weight").T + x @ stored.read("model.mixed.weight"), np.float32)


def test_a_rule_may_name_a_traced_matrix_and_one_that_names_none_is_refused(
    checkpoint: Path, planted: list[str]
) -> None:
    traced = read_traced(_traced(), SHAPES, {name: name for name in SHAPES})
    target, recipe = TARGETS["cpu"], load_recipe("cpu", ["quality=fast", "quantize.0.match=model.up"], str(checkpoint))
    recipe = replace(recipe, quantize=sized(recipe.quantize, parameters=0))
    units = plan_traced_layout(traced, target, recipe).units
    bits = [units[name].spec.bits for name in traced.uses]  # type: ignore[union-attr]
    assert bits == [4, 8, 4]
    with pytest.raises(RecipeError, match=r"rule 1 matches no module: '\*\.uq'"):
        toolkit.plan("cpu", checkpoint=checkpoint, trace=True, changes=["quantize.0.match='*.uq'"])


def test_an_operator_outside_the_table_is_named_before_anything_is_packed(
    checkpoint: Path, planted: list[str], tmp_path: Path
) -> None:
    planted.append("Celu")
    with pytest.raises(UnsupportedError, match=r"not known to run: model\.onnx: Celu is not among its operators"):
        toolkit.plan("cpu", checkpoint=checkpoint, trace=True, out=tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_logits_that_are_no_product_are_refused() -> None:
    model = _traced()
    node = model.graph.outputs[0].producer()
    assert node is not None
    node.op_type = "Softmax"
    traced = read_traced(model, SHAPES, {name: name for name in SHAPES})
    with pytest.raises(UnsupportedError, match="logits are no linear's output"):
        build_traced(traced, plan_traced_layout(traced, TARGETS["cpu"], None), TARGETS["cpu"].form)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"model_type": "llama"}, UnsupportedError, "llama has a fused form, which is faster: leave --trace out"),
        ({"is_encoder_decoder": True}, UnsupportedError, "an encoder with a decoder"),
        ({"auto_map": {"AutoModel": "m.py"}}, UnsupportedError, "code of the checkpoint's own, which is never run"),
        ({"architectures": ["UnheardOfForSequenceClassification"]}, UnsupportedError, "writes no text"),
        ({"quantization_config": {"quant_method": "fp8"}}, UnsupportedError, "is quantized"),
        ({"model_type": 7}, CheckpointError, "expected the name of a family"),
        ({"n_layer": 0}, CheckpointError, "num_hidden_layers is 0"),
    ],
)
def test_a_config_that_cannot_be_traced(
    more: dict[str, Any], error: type[ToolkitError], message: str, tmp_path: Path, planted: list[str]
) -> None:
    folder = _checkpoint(tmp_path / "other", **more)
    with pytest.raises(error, match=message):
        toolkit.plan("cpu", checkpoint=folder, trace=True)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("qnn", {}, UnsupportedError, "--trace is for target cpu in its own form, not for target qnn"),
        ("cpu", {"changes": ["profile=latent-cache"]}, UnsupportedError, "not for profile=latent-cache"),
        ("cpu", {"quality": "balanced"}, UnsupportedError, "expected --quality fast"),
        ("cpu", {"changes": ["quantize.1.algorithm=gptq"]}, UnsupportedError, "rules of rtn or kquant"),
        ("cpu", {"synthetic": True}, RecipeError, "without --synthetic"),
        ("cpu", {"adapter": "somewhere"}, RecipeError, "without --adapter"),
    ],
)
def test_what_a_traced_model_cannot_have(
    name: str, options: dict[str, Any], error: type[ToolkitError], message: str, checkpoint: Path, planted: list[str]
) -> None:
    with pytest.raises(error, match=message):
        toolkit.plan(name, checkpoint=checkpoint, trace=True, **options)


@pytest.mark.parametrize("gone", trace_room.PACKAGES)
def test_a_package_that_is_missing_is_named_with_what_installs_it(
    gone: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == gone else there(name))
    with pytest.raises(MachineError, match=rf"needs {gone}: pip install onnx-distill-toolkit\[trace\]"):
        toolkit.plan("cpu", checkpoint=checkpoint, trace=True)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({**SHAPES, "model.norm.weight": (D,)}, "has no model.norm.weight, which transformers' unheard_of reads"),
        ({**SHAPES, "model.up.weight": (WIDE, D + 1)}, "model.up.weight has shape"),
    ],
)
def test_tensors_that_are_not_as_the_graph_reads_them(
    shapes: dict[str, tuple[int, ...]], message: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace(folder: Path, graph: Path, model_type: str) -> TracedFacts:
        ir.save(_traced(), graph)
        return TracedFacts(shapes, {name: (name.removeprefix("model."),) for name in shapes})

    monkeypatch.setattr(pipeline_traced, "trace_decoder", trace)
    with pytest.raises(CheckpointError, match=message):
        toolkit.plan("cpu", checkpoint=checkpoint, trace=True)


def test_what_the_child_says_is_one_line(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(reason: str) -> None:
        def run(module: str, job: object) -> None:
            raise trace_room.ChildFailed(1, f"Traceback\nerror: {reason}")

        monkeypatch.setattr(trace_room, "run_apart", run)

    fails(trace_room.CACHE_LESS)
    with pytest.raises(UnsupportedError, match="'mamba' cannot run in onnxruntime-genai: it keeps no keys and values"):
        trace_room.trace_decoder(checkpoint, tmp_path / "x.onnx", "mamba")
    fails("a dynamic shape")
    with pytest.raises(UnsupportedError, match="'odd' cannot be traced: a dynamic shape"):
        trace_room.trace_decoder(checkpoint, tmp_path / "x.onnx", "odd")


def test_a_config_by_the_names_of_earlier_years(checkpoint: Path) -> None:
    config = open_any_decoder(checkpoint).config
    assert (config.num_hidden_layers, config.longest_context, config.traced) == (1, 64, True)
