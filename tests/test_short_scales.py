"""Scales of bfloat16 behind a Cast: what is stored is what integers were chosen for, and what ORT's kernels get."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from tests.gptq_oracle import correlated_input, heavy_tailed_weight, second_moment
from tests.graphs import recipe_for, write_graphs
from toolkit.algorithms import ALGORITHMS
from toolkit.checkpoint.config import read_config
from toolkit.evaluate.positions import open_positions
from toolkit.graph.layout import plan_layout
from toolkit.quant import kernel
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, quantize_blocks
from toolkit.quant.gptq import factorize
from toolkit.recipe import QuantRule
from toolkit.target import TARGETS

Floats = NDArray[np.float32]
WIDTH = 256


def _weight(size: float = 0.02) -> Floats:
    return (np.random.default_rng(0).standard_t(4, (40, WIDTH)) * size).astype(np.float32)


def _as_bfloat16(scales: Floats) -> Floats:
    return scales.astype(ml_dtypes.bfloat16).astype(np.float32)


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def test_rounding_is_that_of_bfloat16() -> None:
    """Every exponent of scales, both signs, ties to even, and zero."""
    rng = np.random.default_rng(0)
    scales = (rng.standard_normal((80, 200)) * 10.0 ** rng.integers(-36, 38, (80, 200))).astype(np.float32)
    scales[0, :6] = [0, 1 + 1 / 256, 1 + 3 / 256, -1 - 1 / 256, -1 - 3 / 256, 1 + 1 / 256 + 1e-6]
    expected = _as_bfloat16(scales)
    kernel.shorten(scales)
    np.testing.assert_array_equal(scales, expected)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_integers_are_nearest_to_what_is_stored(algorithm: str, symmetric: bool) -> None:
    """Scales rounded after the integers would leave some of them a level off."""
    weight, spec = _weight(), QuantSpec(4, 32, symmetric, algorithm, short_scales=True)
    blocks = quantize_blocks(weight, spec, np.linspace(0.1, 2, WIDTH, dtype=np.float32))
    np.testing.assert_array_equal(blocks.scales, _as_bfloat16(blocks.scales))
    zeros = 8.0 if blocks.zero_points is None else np.repeat(_nibbles(blocks.zero_points), 32, axis=1)
    steps = weight * np.repeat(np.float32(1) / blocks.scales, 32, axis=1)
    levels = np.clip(np.rint(steps) + zeros, 0, 15).astype(np.uint8)
    np.testing.assert_array_equal(_nibbles(blocks.packed.reshape(len(weight), -1)), levels)


def test_a_solved_matrix_has_scales_of_bfloat16() -> None:
    spec = QuantSpec(4, 32, algorithm="gptq", short_scales=True)
    solved = factorize(second_moment(correlated_input(WIDTH)), 32).solved(heavy_tailed_weight(WIDTH), spec)
    scales = solved.blocks.scales
    assert np.unique(scales).size > 100
    np.testing.assert_array_equal(scales, _as_bfloat16(scales))


@pytest.mark.parametrize("size", [1e-30, 1e-8, 0.02, 1e6, 1e30])
@pytest.mark.parametrize("algorithm", ["rtn", "kquant"])
def test_the_error_is_that_of_long_scales_for_weights_of_any_size(algorithm: str, size: float) -> None:
    """float16 would make scales of 1e-8 zero, and those of 1e6 infinite."""
    short, long = (
        _restored(quantize_blocks(_weight(size), QuantSpec(4, 32, algorithm=algorithm, short_scales=short)))
        for short in (True, False)
    )
    wide = _weight(size).astype(np.float64)
    assert np.square(short - wide).sum() == pytest.approx(np.square(long - wide).sum(), rel=3e-3)


def _restored(blocks: QuantizedBlocks) -> NDArray[np.float64]:
    """(q - zero) * scale of 4-bit blocks of 32 with zero points, in float64."""
    assert blocks.zero_points is not None
    levels = _nibbles(blocks.packed.reshape(len(blocks.packed), -1)).astype(np.float64)
    zeros, scales = _nibbles(blocks.zero_points), blocks.scales.astype(np.float64)
    return (levels - np.repeat(zeros, 32, axis=1)) * np.repeat(scales, 32, axis=1)


@pytest.fixture
def bundle(stories260k: Path, tmp_path: Path) -> Path:
    """A tied head: the embedding and the head read the same scales."""
    write_graphs(stories260k, tmp_path, "cpu", recipe_for("cpu", (QuantRule("*.v_proj", bits=8), QuantRule("*"))))
    return tmp_path


def _casts(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    stored = {value.name for value in model.graph.initializer if value.data_type == onnx.TensorProto.BFLOAT16}
    return [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in stored]


def test_onnxruntime_takes_the_casts_away(bundle: Path, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(bundle / "model.onnx", options, providers=["CPUExecutionProvider"])
    assert not _casts(onnx.load(tmp_path / "optimized.onnx", load_external_data=False))
    written = onnx.load(bundle / "model.onnx", load_external_data=False)
    products = sum(node.op_type == "MatMulNBits" for node in written.graph.node)
    assert len(_casts(written)) == products > 5


def test_logits_are_those_of_the_same_scales_in_float32(bundle: Path, tmp_path: Path) -> None:
    ids = list(range(3, 40))
    made = open_positions(bundle).logits(ids, 20)
    model = onnx.load(bundle / "model.onnx")
    stored = {value.name: value for value in model.graph.initializer}
    for cast in _casts(model):
        value = stored[cast.input[0]]
        wide = onnx.numpy_helper.to_array(value).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(wide, cast.output[0]))
        model.graph.node.remove(cast)
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / "genai_config.json").write_bytes((bundle / "genai_config.json").read_bytes())
    onnx.save(model, tmp_path / "long" / "model.onnx")
    np.testing.assert_array_equal(made, open_positions(tmp_path / "long").logits(ids, 20))


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_cpu_computes_has_short_scales(target: str) -> None:
    config = read_config(Path(__file__).parent.parent / "models" / "1.5b")
    layout = plan_layout(config, TARGETS[target].in_precision("int4"), recipe_for(target))
    kinds = {unit.name.split(".")[1]: unit.slots[1].dtype for unit in layout.matrices()}
    wide = TARGETS[target].form.activations
    # A browser's page has no Cast from bfloat16 where it computes by WebGPU.
    outside = "float32" if target == "webgpu" else "bfloat16"
    assert kinds == {
        "embed_tokens": outside,
        "layers": "bfloat16" if target.startswith("cpu") else wide,
        "weight": outside,
    }
    if target == "cpu":
        # 4 bits, 16 for the scale of 32, 4 for its zero point; alignment is no part of it.
        assert layout.bits_per_weight() == 4 + 16 / 32 + 4 / 32
