"""What the Hexagon NPU computes wrongly in silence: each rule is a node that compiles, runs, and gives other numbers.

Measured in the simulator of onnxruntime-qnn 2.7.0 against ONNX Runtime's CPU kernels (LOG.md).
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir

from toolkit import names
from toolkit.graph.interface import constant_values, load_graph
from toolkit.quant.signed_kernel import SIXTEENTHS

_NORMS: Final = ("RMSNormalization", "SimplifiedLayerNormalization")
# Operators whose output has the rank of their first input.
_SAME_RANK: Final = ("Add", "Cast", "DequantizeLinear", "MatMul", "Mul", "QuantizeLinear", "Sigmoid", *_NORMS)
# It takes narrower ones, and computes others (LOG.md).
_SMALLEST_BLOCK: Final = 16
# Of a sixteenth: what float16 may add to a whole one.
_TOLERANCE: Final = 0.05


def htp_faults(bundle: Path, stages: list[str]) -> list[str]:
    """One line for each kind of node in these stages' graphs that HTP gets wrong, with how many there are.

    Raises BundleError for a graph or weights that cannot be read.
    """
    problems = []
    for stage in stages:
        path = bundle / names.stage_file(stage)
        found: dict[str, list[str]] = defaultdict(list)
        for node in load_graph(path).graph if path.is_file() else ():
            if reason := _wrong(node, bundle):
                found[reason].append(str(node.name))
        problems += [f"{path.name}: {reason}, in {len(nodes)} such as {nodes[0]}" for reason, nodes in found.items()]
    return problems


def _wrong(node: ir.Node, folder: Path) -> str:
    if node.op_type == "Swish":
        return "HTP computes Swish wrongly in uint16: write Sigmoid, rounded, and Mul"
    if node.op_type in _NORMS and _rank(node.inputs[0]) == 4:
        return f"HTP computes {node.op_type} of rank 4 wrongly: reshape it to rank 3"
    if node.op_type != "DequantizeLinear" or node.inputs[0] is None or node.inputs[0].dtype != ir.DataType.INT4:
        return ""
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is None:
        return "HTP takes int4 weights without a zero_point for others: give one of zeros"
    if zero_point.const_value is not None and constant_values(zero_point.const_value, folder).any():
        return "HTP takes int4 weights with a zero point of 0 alone"
    block_size = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
    if 0 < block_size < _SMALLEST_BLOCK:
        return f"HTP computes int4 weights in blocks of {block_size} wrongly: take {_SMALLEST_BLOCK} or more"
    scales = node.inputs[1]
    if scales is None or scales.const_value is None or len(scales.const_value.shape) < 2:
        return ""
    count = scales.const_value.shape.numpy()[0]
    if block_size == _SMALLEST_BLOCK and count > 1 and count % 2:
        return f"HTP computes an odd number of int4 blocks of {block_size} wrongly: take a scale a row"
    return _unsnapped(constant_values(scales.const_value, folder).astype(np.float64))


def _unsnapped(scales: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> str:
    """Scales [J, N] of blocks are kept as 1 … 16 sixteenths of each channel's largest."""
    largest = np.abs(scales).max(axis=0)
    sixteenths = scales[:, largest > 0] / largest[largest > 0] * SIXTEENTHS
    if (sixteenths < 0).any():
        return "HTP takes positive scales alone"
    off = np.abs(sixteenths - np.rint(sixteenths)).max(initial=0.0)
    least = sixteenths.min(initial=SIXTEENTHS)
    if off > _TOLERANCE or least < 1 - _TOLERANCE:
        return "HTP keeps a block's scale as 1 to 16 sixteenths of its channel's largest, and rounds others: snap them"
    return ""


def _rank(value: ir.Value | None) -> int | None:
    """How many dimensions a value has, as far as the graph says."""
    while value is not None:
        if value.shape is not None:
            return len(value.shape)
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Reshape":
            shape = node.inputs[1]
            return None if shape is None or shape.const_value is None else shape.const_value.numpy().size
        if node.op_type == "Transpose":
            return len(node.attributes["perm"].as_ints()) if "perm" in node.attributes else None
        value = node.inputs[0] if node.op_type in _SAME_RANK else None
    return None
