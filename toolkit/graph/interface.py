"""What a graph file takes and gives, and which operators it is made of; its weights are not read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from toolkit.errors import BundleError


@dataclass(frozen=True)
class ValueType:
    """A graph input or output; symbolic dimensions are names."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphInterface:
    """Inputs and outputs by name, and how often each op type stands in the graph."""

    inputs: dict[str, ValueType]
    outputs: dict[str, ValueType]
    operators: dict[str, int]


def read_interface(path: Path) -> GraphInterface:
    """Raises BundleError if the file is not an ONNX graph."""
    try:
        graph = ir.load(path).graph
    except Exception as problem:  # protobuf's errors have no common root short of Exception
        raise BundleError(f"{path} is not an ONNX graph: {str(problem).splitlines()[0][:120]}") from None
    return GraphInterface(
        {str(value.name): _type(value) for value in graph.inputs},
        {str(value.name): _type(value) for value in graph.outputs},
        dict(sorted(Counter(node.op_type for node in graph).items())),
    )


def _type(value: ir.Value) -> ValueType:
    dims = value.shape or ()
    dtype = value.dtype.name if value.dtype else "?"
    return ValueType(dtype, tuple(dim if isinstance(dim, int) else str(dim.value) for dim in dims))
