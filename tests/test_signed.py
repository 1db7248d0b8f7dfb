"""Signed integers for DequantizeLinear: the kernel against numpy and ORT's own operators, GPTQ with standing scales."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from tests.gptq_oracle import (
    correlated_input,
    damped_moment,
    heavy_tailed_weight,
    output_error,
    restored_weight,
    second_moment,
)
from toolkit.quant.blockwise import QuantSpec, dequantize_blocks, quantize_blocks, signed_integers
from toolkit.quant.gptq import factorize
from toolkit.quant.ranges import HEADROOM, ActivationRange, uint16_parameters

Floats = NDArray[np.float32]
WIDTH = 256
BLOCKS = (32, 64, 128)
LPBQ = [QuantSpec(4, block, True, "kquant", signed=True) for block in BLOCKS]
ROW_SCALES = [QuantSpec(bits, WIDTH, True, "kquant", signed=True) for bits in (4, 8)]
SPECS = [*LPBQ, *ROW_SCALES]


def _unit(scales: Floats) -> Floats:
    return np.asarray(scales.max(axis=1, keepdims=True) / 16)


@pytest.mark.parametrize("algorithm", ["rtn", "kquant", "imatrix"])
@pytest.mark.parametrize("spec", LPBQ, ids=str)
def test_scales_of_blocks_are_sixteenths_of_the_rows_largest(spec: QuantSpec, algorithm: str) -> None:
    spec = replace(spec, algorithm=algorithm)
    scales = quantize_blocks(heavy_tailed_weight(WIDTH), spec, np.ones(WIDTH, np.float32)).scales
    sixteenths = scales / _unit(scales)
    assert np.allclose(sixteenths, np.rint(sixteenths), atol=1e-4)
    assert sixteenths.min() >= 1 and np.allclose(sixteenths.max(axis=1), 16)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_without_a_search_nothing_is_clipped_and_every_value_is_the_nearest(spec: QuantSpec) -> None:
    """In float64, from the definition: s from the range, sixteenths rounded up, levels to the nearest."""
    spec, weight = replace(spec, algorithm="rtn"), heavy_tailed_weight(WIDTH)
    half = 1 << (spec.bits - 1)
    blocks = weight.astype(np.float64).reshape(len(weight), -1, spec.block_size)
    free = np.maximum(blocks.max(axis=2) / (half - 1), -blocks.min(axis=2) / half)
    unit = free.max(axis=1, keepdims=True) / 16
    scales = free if free.shape[1] == 1 else np.clip(np.ceil(free / unit - 1e-4), 1, 16) * unit
    expected = np.clip(np.rint(blocks / scales[..., None]), -half, half - 1) * scales[..., None]
    found = quantize_blocks(weight, spec)
    restored = dequantize_blocks(found, spec, WIDTH)
    miss = np.abs(restored - expected.reshape(len(weight), -1))
    # But for ties, which float32 may break the other way.
    assert (miss > 1e-5).mean() < 1e-3
    assert np.abs(restored - weight).max() <= 0.5001 * scales.max()
    assert found.noise == pytest.approx(float(((restored - weight) ** 2).sum()), rel=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_search_beats_the_range_on_its_own_objective(spec: QuantSpec) -> None:
    weight, importance = (
        heavy_tailed_weight(WIDTH),
        np.exp(np.random.default_rng(3).standard_normal(WIDTH)).astype(np.float32),
    )

    def error(algorithm: str) -> float:
        made = replace(spec, algorithm=algorithm)
        miss = dequantize_blocks(quantize_blocks(weight, made, importance), made, WIDTH) - weight
        return float((miss**2 * importance).sum())

    gain = {4: 0.8, 8: 1.0}[spec.bits]
    assert error("imatrix") < gain * error("rtn")
    assert error("imatrix") < error("kquant")


def test_blocks_beat_rows_and_small_blocks_large_ones() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 1536)).astype(np.float32)

    def error(block_size: int) -> float:
        return quantize_blocks(weight, QuantSpec(4, block_size, True, "kquant", signed=True)).noise

    errors = [error(size) for size in (32, 64, 128, 1536)]
    assert errors == sorted(errors) and errors[0] < 0.65 * errors[-1]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_dead_constant_and_huge_rows(spec: QuantSpec) -> None:
    weight = heavy_tailed_weight(WIDTH)
    weight[0], weight[1], weight[2] = 0, 0.25, 1e30
    weight[3, : WIDTH // 2] = 0
    found = quantize_blocks(weight, replace(spec, algorithm="imatrix"), np.zeros(WIDTH, np.float32))
    restored = dequantize_blocks(found, spec, WIDTH)
    assert np.isfinite(restored).all() and (found.scales >= 0).all()
    assert not restored[0].any() and not restored[3, : WIDTH // 2].any()
    assert np.allclose(restored[1], 0.25, rtol=1e-5) and np.allclose(restored[2], 1e30, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_onnx_runtime_restores_what_we_meant(spec: QuantSpec) -> None:
    """DequantizeLinear over the bytes as the data file has them."""
    weight = heavy_tailed_weight(WIDTH)
    found = quantize_blocks(weight, spec)
    integers = signed_integers(found.packed.reshape(len(weight), -1), spec.bits)
    scales = np.ascontiguousarray(found.scales.T)
    zeros = np.zeros(scales.size * spec.bits // 8, np.uint8)
    kind = TensorProto.INT4 if spec.bits == 4 else TensorProto.INT8
    one = scales.shape[0] == 1
    shape, dims = (WIDTH, len(weight)), (len(weight),) if one else scales.shape
    tensors = [
        helper.make_tensor("w", kind, shape, integers.tobytes(), raw=True),
        helper.make_tensor("s", TensorProto.FLOAT, dims, scales.tobytes(), raw=True),
        helper.make_tensor("z", kind, dims, zeros.tobytes(), raw=True),
    ]
    how: dict[str, Any] = {"axis": 1} if one else {"axis": 0, "block_size": spec.block_size}
    node = helper.make_node("DequantizeLinear", ["w", "s", "z"], ["y"], **how)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    graph = helper.make_graph([node], "g", [], [out], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    (restored,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {})
    assert np.array_equal(restored, dequantize_blocks(found, spec, WIDTH).T)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gptq_with_standing_scales_is_the_textbooks_recursion(spec: QuantSpec) -> None:
    """Optimal brain quantization in float64, one elimination a column (arXiv 2208.11580, algorithm 3)."""
    spec, weight, moment = (
        replace(spec, algorithm="gptq"),
        heavy_tailed_weight(WIDTH),
        second_moment(correlated_input(WIDTH)),
    )
    factor = factorize(moment, WIDTH)
    solved = factor.solved(weight, spec).blocks
    half = 1 << (spec.bits - 1)
    scales = np.repeat(solved.scales.astype(np.float64), spec.block_size, axis=1)
    left, expected = weight.astype(np.float64), np.zeros(weight.shape)
    inverse = np.linalg.inv(damped_moment(moment, factor))
    for column in factor.visits.order:
        x = left[:, column]
        expected[:, column] = np.clip(np.rint(x / scales[:, column]), -half, half - 1) * scales[:, column]
        left -= np.outer((x - expected[:, column]) / inverse[column, column], inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    found = restored_weight(solved, spec, WIDTH)
    same = (np.abs(found - expected) <= 1e-4 * np.abs(expected).max()).all(axis=1)
    assert same.mean() >= (0.9 if spec.bits == 4 else 0.25)
    ours, theirs = (output_error(weight, q, moment) for q in (found, expected))
    assert ours == pytest.approx(theirs, rel=0.005 if spec.bits == 4 else 0.15)
    rounding = replace(spec, algorithm="imatrix")
    blocks = quantize_blocks(weight, rounding, np.ascontiguousarray(np.diagonal(moment)))
    assert np.array_equal(blocks.scales, solved.scales)
    assert ours < 0.6 * output_error(weight, restored_weight(blocks, rounding, WIDTH), moment)


@pytest.mark.parametrize("low, high", [(-3.0, 5.0), (0.0, 1 / HEADROOM), (-0.01, 0.002), (-4000.0, 12.0), (0.0, 0.0)])
def test_uint16_parameters_hold_the_range_in_onnx_runtimes_quantize_linear(low: float, high: float) -> None:
    scale, zero_point = uint16_parameters(ActivationRange(low, high))
    x = np.linspace(low, high, 1001).astype(np.float16)
    node_in = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1001])
    node_out = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1001])
    tensors = [onnx.numpy_helper.from_array(np.array(v), name) for v, name in ((scale, "s"), (zero_point, "z"))]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [node_in], [node_out], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    step = float(scale)
    assert 0 < step <= 1.001 * HEADROOM * (high - low) / 65535 + 6e-8
    # Half a step, and what float16 keeps of the value itself.
    assert (np.abs(y.astype(np.float64) - x) <= 0.51 * step + 1e-3 * np.abs(x)).all()
    assert not y[x == 0].any()
