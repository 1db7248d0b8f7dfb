"""The number formats against ORT's own MatMulNBits and GatherBlockQuantized kernels."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto as T
from onnx import helper

from toolkit.quant.blockwise import QuantSpec, dequantize_blocks, quantize_blocks

SPECS = [QuantSpec(bits, block, sym) for bits in (4, 8) for block in (16, 32, 128, 256) for sym in (True, False)]


def _run(node: onnx.NodeProto, inputs: dict[str, np.ndarray], output_rank: int) -> np.ndarray:
    kinds = {np.dtype(np.float32): T.FLOAT, np.dtype(np.uint8): T.UINT8, np.dtype(np.int64): T.INT64}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, kinds[a.dtype], a.shape) for n, a in inputs.items() if n == "x"],
        [helper.make_tensor_value_info("y", T.FLOAT, [None] * output_rank)],
        [onnx.numpy_helper.from_array(a, n) for n, a in inputs.items() if n != "x"],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString()).run(None, {"x": inputs["x"]})[0]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("width", [172, 256])
def test_matmulnbits_computes_with_our_dequantized_weights(spec: QuantSpec, width: int) -> None:
    weight = np.random.default_rng(0).standard_normal((24, width)).astype(np.float32)
    weight[3] = 0
    blocks = quantize_blocks(weight, spec)
    inputs: dict[str, np.ndarray] = {"x": np.eye(width, dtype=np.float32), "b": blocks.packed, "s": blocks.scales}
    if blocks.zero_points is not None:
        inputs["z"] = blocks.zero_points
    node = helper.make_node(
        "MatMulNBits",
        list(inputs),
        ["y"],
        domain="com.microsoft",
        K=width,
        N=24,
        bits=spec.bits,
        block_size=spec.block_size,
        accuracy_level=1,
    )
    # An identity input reads the kernel's own dequantized weight, one column per row.
    np.testing.assert_array_equal(_run(node, inputs, 2).T, dequantize_blocks(blocks, spec, width))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gather_block_quantized_reads_our_rows(spec: QuantSpec) -> None:
    weight = np.random.default_rng(1).standard_normal((24, 256)).astype(np.float32)
    blocks = quantize_blocks(weight, spec)
    inputs: dict[str, np.ndarray] = {"d": blocks.packed.reshape(24, -1), "x": np.arange(24), "s": blocks.scales}
    if blocks.zero_points is not None:
        inputs["z"] = blocks.zero_points
    node = helper.make_node(
        "GatherBlockQuantized",
        list(inputs),
        ["y"],
        domain="com.microsoft",
        gather_axis=0,
        quantize_axis=1,
        bits=spec.bits,
        block_size=spec.block_size,
    )
    np.testing.assert_array_equal(_run(node, inputs, 2), dequantize_blocks(blocks, spec, 256))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rounding_error_is_within_a_step_and_a_quarter_on_average(spec: QuantSpec) -> None:
    weight = np.random.default_rng(2).standard_normal((16, 256)).astype(np.float32)
    blocks = quantize_blocks(weight, spec)
    error = np.abs(weight - dequantize_blocks(blocks, spec, 256)).reshape(16, -1, spec.block_size)
    step = np.abs(blocks.scales)[..., None]
    # Half a step of rounding; up to half more where the range's ends clip (symmetric: one side; else the zero point).
    assert (error <= 1.001 * step + 1e-6).all()
    assert (error > 0.501 * step + 1e-6).mean() < 0.05
    assert error.mean() <= 0.3 * step.mean()
