"""The NPU's stages in uint16: what they compute, which bytes they hold, and what HTP would get wrong in silence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tests.graphs import export_bundle
from tests.random_models import CASES, make_checkpoint
from tests.sources import Changed
from toolkit import names
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.checkpoint.padded_heads import pad_heads
from toolkit.checkpoint.rotated import rotate
from toolkit.errors import RecipeError
from toolkit.evaluate.positions import Pipeline
from toolkit.graph.htp_faults import htp_faults
from toolkit.graph.interface import load_graph
from toolkit.partition import pack, rows
from toolkit.partition.stored import StoredTensors
from toolkit.pipeline import export
from toolkit.pipeline.check import check_bundle
from toolkit.pipeline.export import Order, export_bundles
from toolkit.pipeline.plan import plan_export
from toolkit.pipeline.text import token_sequences
from toolkit.recipe import load_recipe
from toolkit.reference.decoder import read_layer, rms_norm

Floats = NDArray[np.float32]
FAST = ("quality=fast", "bits_per_weight=0", "rotate=false")
BUNDLES = {
    "blocks": ("profile=lpbq", *FAST),
    "rows": ("profile=row-scales", *FAST),
    "rotated": ("profile=row-scales", *FAST[:2]),
    "8 bits": ("profile=lpbq", *FAST, "quantize.0.bits=8"),
    "narrow blocks": ("profile=lpbq", *FAST, "quantize.0.block_size=16"),
}


@pytest.fixture(scope="session")
def bundles(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, checkpoint = tmp_path_factory.mktemp("qdq"), open_checkpoint(tiny_r1)
    made = {}
    for name, changes in BUNDLES.items():
        made[name] = export_bundle(load_recipe("tiny-r1-qnn", changes), checkpoint, folder / name.replace(" ", "-"))
    return made


def _weights(graph: Path) -> dict[str, Floats]:
    """By tensor, [N, K] from the integers, scales and zero points a graph's DequantizeLinear reads: by its definition,
    (x - zero_point) * scale."""
    tensors = {value.name: value.const_value for value in load_graph(graph).graph.initializers.values()}
    found = {}
    for name in [str(name) for name in tensors if str(name).endswith(".integers")]:
        tensor = name.removesuffix(".integers")
        integers, scales, zeros = (
            np.asarray(tensors[f"{tensor}.{part}"].numpy(), np.float32)  # type: ignore[union-attr]
            for part in ("integers", "scales", "zero_points")
        )
        spread = [v if v.ndim == 1 else np.repeat(v, integers.shape[0] // v.shape[0], axis=0) for v in (scales, zeros)]
        found[tensor] = np.ascontiguousarray(((integers - spread[1]) * spread[0]).T)
    return found


def _expected(checkpoint: Checkpoint, weights: dict[str, Floats], embedded: Floats) -> Floats:
    """The reference forward of the rounded weights on the same embedded tokens, activations as they are."""
    config, source = checkpoint.config, Changed(checkpoint.source, weights)
    x = embedded.astype(np.float32)
    for k in range(config.num_hidden_layers):
        x = read_layer(config, source, k)(x)
    return rms_norm(x, source.read("model.norm.weight"), config.rms_norm_eps)


@pytest.mark.parametrize("case", BUNDLES)
def test_stages_compute_the_reference_of_their_weights(case: str, bundles: dict[str, Path], tiny_r1: Path) -> None:
    bundle, checkpoint = bundles[case], open_checkpoint(tiny_r1)
    checkpoint = pad_heads(rotate(checkpoint) if case == "rotated" else checkpoint, 16)
    # Ranges hold for text; random ids are beyond them, at .02.
    ids = token_sequences(checkpoint, tiny_r1 / "arithmetic.jsonl", 90, 90)[0]
    # .006 to .008; a range of another tensor is beyond .03.
    assert _error_on(bundle, checkpoint, ids) < 0.012
    weights = _weights(bundle / "context.onnx")
    assert len(weights) == 7 * checkpoint.config.num_hidden_layers
    exact = checkpoint.source
    for tensor, rounded in weights.items():
        weight = exact.read(tensor)
        assert np.square(rounded - weight).sum() < (1e-3 if case == "8 bits" else 0.03) * np.square(weight).sum()


@pytest.mark.parametrize("case", BUNDLES)
def test_weights_are_read_back_as_graphs_read_them(case: str, bundles: dict[str, Path], tiny_r1: Path) -> None:
    bundle = bundles[case]
    recipe = load_recipe("tiny-r1-qnn", BUNDLES[case])
    stored = StoredTensors(plan_export(recipe, open_checkpoint(tiny_r1), bundle, "int4").layout, bundle)
    expected = _weights(bundle / "context.onnx")
    for tensor, weight in expected.items():
        np.testing.assert_array_equal(stored.read(tensor), weight)
        np.testing.assert_array_equal(stored.read_rows(tensor, 5, 9), weight[5:9])


def test_formats_are_those_asked_for(bundles: dict[str, Path]) -> None:
    graph = load_graph(bundles["blocks"] / "iterator.onnx").graph
    values = {str(value.name): value for value in graph.initializers.values()}
    down = "model.layers.0.mlp.down_proj.weight"
    shapes = {part: values[f"{down}.{part}"].const_value.shape.numpy() for part in ("integers", "scales")}  # type: ignore[union-attr]
    assert shapes == {"integers": (768, 256), "scales": (12, 256)}
    for name, kind, scales in (("rows", ir.DataType.INT4, (256,)), ("8 bits", ir.DataType.INT8, (256,))):
        graph = load_graph(bundles[name] / "context.onnx").graph
        found = {str(value.name): value.const_value for value in graph.initializers.values()}
        assert found[f"{down}.integers"].dtype == kind  # type: ignore[union-attr]
        assert found[f"{down}.scales"].shape.numpy() == scales  # type: ignore[union-attr]


@pytest.mark.parametrize("case", BUNDLES)
def test_every_profile_is_legal(case: str, bundles: dict[str, Path]) -> None:
    assert check_bundle(bundles[case], run=False).problems == ()
    for stage in ("context", "iterator"):
        onnx.checker.check_model(str(bundles[case] / f"{stage}.onnx"))


def test_ranges_do_not_hide_that_weights_were_rounded_without_data(bundles: dict[str, Path]) -> None:
    made = json.loads((bundles["blocks"] / "report.json").read_text(encoding="utf-8"))["quantization"]
    assert made["salient_inputs"] and made["calibration"]["activations"]["dtype"] == "uint16"


def test_float32_has_no_rounding(tiny_r1: Path, tmp_path: Path) -> None:
    recipe = load_recipe("tiny-r1-qnn", BUNDLES["blocks"])
    bundle = export_bundle(recipe, open_checkpoint(tiny_r1), tmp_path / "b", "fp32")
    assert "QuantizeLinear" not in {node.op_type for node in load_graph(bundle / "context.onnx").graph}


def _error_on(bundle: Path, checkpoint: Checkpoint, ids: list[int]) -> float:
    """rms of the hidden states' difference from the reference of the bundle's own weights, over their spread."""
    steps = list(Pipeline(bundle).stage_runs(ids, len(ids) - 4))
    embedded = np.concatenate([step.feeds[names.EMBEDDED][0, :kept] for step, kept in steps])
    made = np.concatenate([step.hidden[0, :kept] for step, kept in steps])
    expected = _expected(checkpoint, _weights(bundle / "context.onnx"), embedded)
    return float(np.sqrt(((made - expected) ** 2).mean()) / expected.std())


SMALL = ("quality=fast", "profile=lpbq", "context_length=64", "window=16")


def test_heads_with_norms_of_their_own(tmp_path: Path) -> None:
    family, extra = CASES["qwen3"]
    make_checkpoint(family, extra, tmp_path / "c")
    checkpoint = replace(open_checkpoint(tmp_path / "c"), synthetic=True)  # calibrated on random ids
    bundle = export_bundle(load_recipe("qnn", SMALL, str(tmp_path / "c")), checkpoint, tmp_path / "b")
    assert htp_faults(bundle, ["context", "iterator"]) == []
    ids = [int(i) for i in np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, 20)]
    assert _error_on(bundle, pad_heads(checkpoint, 16), ids) < 0.02


def test_widths_that_no_block_divides(stories260k: Path, tmp_path: Path) -> None:
    text = "\n\n".join(f"once upon a time there were {k} little cats." for k in range(200))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    changes = [f"calibration={tmp_path / 'text.txt'}", *SMALL]
    checkpoint = open_checkpoint(stories260k)
    bundle = export_bundle(load_recipe("qnn", changes, str(stories260k)), checkpoint, tmp_path / "b")
    assert htp_faults(bundle, ["context", "iterator"]) == []
    # 172 columns of down_proj, no multiple of 32: a scale a row.
    (scales,) = [
        value.const_value
        for value in load_graph(bundle / "context.onnx").graph.initializers.values()
        if value.name == "model.layers.0.mlp.down_proj.weight.scales"
    ]
    assert scales is not None and scales.shape.numpy() == (64,)
    ids = token_sequences(checkpoint, tmp_path / "text.txt", 20, 20)[0]
    # .0015; by the exact weights' ranges .036: here the rounded ones reach further, and one token is cut off.
    assert _error_on(bundle, pad_heads(checkpoint, 16), ids) < 0.006


def test_matrices_that_come_in_pieces_are_gathered(
    bundles: dict[str, Path], tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr(rows, "_TURNED", 64)
    whole = bundles["narrow blocks"]
    recipe = load_recipe("tiny-r1-qnn", BUNDLES["narrow blocks"])
    bundle = export_bundle(recipe, open_checkpoint(tiny_r1), tmp_path / "b")
    for path in whole.glob("*.data"):
        assert (bundle / path.name).read_bytes() == path.read_bytes()


def test_what_reads_text_for_its_ranges_alone_is_packed_with_others(
    bundles: dict[str, Path], tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    plain = export.pack_weights

    def counted(source: Any, destinations: Any, *rest: Any) -> Any:
        passes.append(len(destinations))
        return plain(source, destinations, *rest)

    monkeypatch.setattr(export, "pack_weights", counted)
    made = {"cpu": ("tiny-r1-cpu", FAST), "qnn": ("tiny-r1-qnn", BUNDLES["blocks"])}
    orders = [Order(load_recipe(name, changes), tmp_path / key) for key, (name, changes) in made.items()]
    _, qnn = export_bundles(orders, open_checkpoint(tiny_r1))
    assert passes == [2]
    for path in bundles["blocks"].glob("*.onnx*"):
        assert (qnn / path.name).read_bytes() == path.read_bytes()
    report = json.loads((qnn / "report.json").read_text(encoding="utf-8"))
    assert "calibrate tiny-r1-qnn" not in {stage["name"] for stage in report["conversion"]["stages"]}
    assert report["quantization"]["calibration"]["text"] == "calibration.jsonl"


def test_an_export_stopped_while_ranges_are_taken_resumes_to_the_same_bytes(
    bundles: dict[str, Path], tiny_r1: Path, tmp_path: Path
) -> None:
    def stop(what: str) -> None:
        if what == "ranges of layer 2":
            raise KeyboardInterrupt

    order = Order(load_recipe("tiny-r1-qnn", BUNDLES["blocks"]), tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        export_bundles([order], open_checkpoint(tiny_r1), progress=stop)
    assert not order.out.exists()
    (bundle,) = export_bundles([order], open_checkpoint(tiny_r1))
    for path in bundles["blocks"].glob("*.onnx*"):
        assert (bundle / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("recipe", "change", "words"),
    [
        ("tiny-r1-qnn", "profile=lpqb", r"profile is 'lpqb' \(did you mean 'lpbq'\?\), and target qnn has"),
        ("tiny-r1-cpu-split", "profile=lpbq", "target cpu-split has one form alone: leave profile out"),
        ("tiny-r1-cpu", "profile=lpbq", "profile is 'lpbq', and target cpu has none or latent-cache"),
        ("tiny-r1-qnn", "activation_percentile=50", "activation_percentile is 50, expected 90 to 100"),
        ("tiny-r1-qnn", "activation_percentile=true", "activation_percentile is True, expected 90 to 100"),
    ],
)
def test_bad_profiles_are_one_line(recipe: str, change: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(recipe, [change])


def test_ranges_want_text_even_where_weights_do_not(tiny_r1: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("1 + 1 = 2", encoding="utf-8")
    recipe = load_recipe("tiny-r1-qnn", [*BUNDLES["blocks"], f"calibration={tmp_path / 'short.txt'}"])
    with pytest.raises(RecipeError, match="tokens of calibration text, at least 256 are needed"):
        export_bundle(recipe, open_checkpoint(tiny_r1), tmp_path / "b")
    assert not (tmp_path / "b").exists()


Edit = Callable[[onnx.ModelProto], None]


def _without_zero_point(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0].endswith("up_proj.weight.integers"):
            del node.input[2:]


def _a_zero_point_of_one(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name.endswith("up_proj.weight.zero_points"):
            dims = list(tensor.dims)
            tensor.CopyFrom(helper.make_tensor(tensor.name, onnx.TensorProto.INT4, dims, [1] * int(np.prod(dims))))


def _free_scales(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "model.layers.0.mlp.up_proj.weight.scales":
            free = np.random.default_rng(0).uniform(0.01, 0.02, list(tensor.dims)).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(free, tensor.name))


def _tiny_scales(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "model.layers.0.mlp.up_proj.weight.scales":
            few = np.full(list(tensor.dims), 0.016, np.float16)
            few[0] = 0
            tensor.CopyFrom(numpy_helper.from_array(few, tensor.name))


def _blocks_of_eight(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "block_size" and node.input[0].endswith("layers.0.mlp.up_proj.weight.integers"):
                attribute.i = 8


def _a_swish(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    node.op_type = "Swish"


def _a_norm_of_rank_4(model: onnx.ModelProto) -> None:
    k, node = next((k, n) for k, n in enumerate(model.graph.node) if n.op_type == "RMSNormalization")
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 1, -1, 256], np.int64), "four"))
    model.graph.node.insert(k, helper.make_node("Reshape", [node.input[0], "four"], ["of_rank_4"]))
    model.graph.node[k + 1].input[0] = "of_rank_4"


PLANTED: dict[str, tuple[Edit, str]] = {
    "no zero point": (_without_zero_point, "int4 weights without a zero_point for others.*, in 4"),
    "another zero point": (_a_zero_point_of_one, "a zero point of 0 alone, in 4"),
    "free scales": (_free_scales, "1 to 16 sixteenths of its channel's largest.*, in 1 such as"),
    "a scale of nothing": (_tiny_scales, "1 to 16 sixteenths of its channel's largest.*, in 1 such as"),
    "blocks of 8": (_blocks_of_eight, "in blocks of 8 wrongly: take 16 or more, in 1 such as"),
    "swish": (_a_swish, "Swish wrongly in uint16"),
    "a norm of rank 4": (_a_norm_of_rank_4, "RMSNormalization of rank 4 wrongly"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_each_silent_error_of_htp_is_named(case: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    change, words = PLANTED[case]
    bundle = Path(shutil.copytree(bundles["blocks"], tmp_path / "b"))
    assert htp_faults(bundle, ["context", "iterator"]) == []
    model = onnx.load(bundle / "context.onnx", load_external_data=False)
    change(model)
    onnx.save(model, bundle / "context.onnx")
    (problem,) = htp_faults(bundle, ["context", "iterator"])
    assert problem.startswith("context.onnx: HTP ")
    assert re.search(words, problem), problem
