"""Which blocks of int4 weights the Hexagon NPU computes rightly, one product at a time, in QNN's simulator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.compiler import needs_compiler
from toolkit.graph.htp_faults import htp_faults
from toolkit.quant.blockwise import QuantSpec, quantize_blocks, signed_levels
from toolkit.target import TARGETS

K, N, TOKENS = 128, 64, 4
# In a process of its own: native code of vendors may crash.
RUN = """
import sys
from pathlib import Path
import numpy as np
from toolkit.epcontext.htp import open_htp
from toolkit.target import TARGETS
folder = Path(sys.argv[1])
options = dict(TARGETS["qnn"].in_profile("lpbq").accelerator.provider_options)
session = open_htp(folder / "context.onnx", options, {}, folder)
np.save(folder / "y.npy", session.run(None, {"x": np.load(folder / "x.npy")})[0])
"""


def _product(folder: Path, block_size: int) -> NDArray[np.float32]:
    """Writes a graph of one product in uint16 with random weights, and its input; returns the exact output
    [TOKENS, N]."""
    generator = np.random.default_rng(block_size)
    weight, spec = generator.standard_normal((N, K)).astype(np.float32), QuantSpec(4, block_size, True, "kquant", True)
    blocks = quantize_blocks(weight, spec)
    levels = signed_levels(blocks.packed.reshape(-1) ^ np.uint8(0x88), 4).reshape(N, K)
    scales = blocks.scales.T.astype(np.float16)
    restored = levels.T * np.repeat(scales.astype(np.float32), block_size, axis=0)
    x = generator.standard_normal((1, TOKENS, K)).astype(np.float16)
    y = x[0].astype(np.float32) @ restored
    zeros = [0] * scales.size
    constants = [
        helper.make_tensor("w", TensorProto.INT4, (K, N), levels.T.reshape(-1).astype(int).tolist()),
        numpy_helper.from_array(np.ascontiguousarray(scales), "scales"),
        helper.make_tensor("zeros", TensorProto.INT4, scales.shape, zeros),
        numpy_helper.from_array(np.array(32768, np.uint16), "middle"),
    ]
    for name, values in (("x_scale", x), ("y_scale", y)):
        constants.append(numpy_helper.from_array(np.array(2.5 * float(abs(values).max()) / 65535, np.float16), name))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "middle"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "x_scale", "middle"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "scales", "zeros"], ["wd"], axis=0, block_size=block_size),
        helper.make_node("MatMul", ["xd", "wd"], ["product"]),
        helper.make_node("QuantizeLinear", ["product", "y_scale", "middle"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "y_scale", "middle"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)
        for name, shape in (("x", [1, TOKENS, K]), ("y", [1, TOKENS, N]))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "context.onnx"
    )
    np.save(folder / "x.npy", x)
    return y


@needs_compiler
@pytest.mark.parametrize("block_size", [8, 16, 64])
def test_the_linter_names_the_blocks_that_are_computed_wrongly(block_size: int, tmp_path: Path) -> None:
    y = _product(tmp_path, block_size)
    done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    error = np.sqrt(((np.load(tmp_path / "y.npy")[0].astype(np.float32) - y) ** 2).mean()) / y.std()
    # .0004 where HTP knows the blocks; 1 would be as good as nothing, and it is 3.
    assert (error < 0.002) if block_size >= 16 else (error > 0.5)
    assert bool(htp_faults(tmp_path, ["context"])) is (block_size < 16)


def test_the_default_blocks_are_among_them() -> None:
    assert {rule.get("block_size") for rule in TARGETS["qnn"].quantize} <= {16, 32, 64}
