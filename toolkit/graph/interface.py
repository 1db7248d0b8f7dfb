"""What a graph file takes and gives, and the nodes it is made of; its weights are not read.

onnx_ir is imported where a graph is read: it takes half a second, and most who ask for a bundle's settings read none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import BundleError

if TYPE_CHECKING:
    import onnx_ir as ir

_TO_BOOL: Final = ("And", "Equal", "Greater", "GreaterOrEqual", "IsNaN", "Less", "LessOrEqual", "Not")
_TO_INT64: Final = ("ArgMax", "Shape")
# Which input has the dtype of the output, where it is not the first.
_LIKE: Final = {"CastLike": 1, "DequantizeLinear": 1, "GatherBlockQuantized": 2, "Where": 1}


@dataclass(frozen=True)
class ValueType:
    """A graph input or output; symbolic dimensions are names."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class NodeFacts:
    """One node. `operator` is the op type, after `domain:` outside the default domain; `dtype` is of the input that
    decides its kernel; `annotation` is its `layer_ann`."""

    name: str
    operator: str
    dtype: str
    inputs: int
    attributes: dict[str, int | float | str]
    annotation: str


@dataclass(frozen=True)
class GraphInterface:
    """Inputs and outputs by name, the nodes in order, the opset, and what else the file says of itself."""

    inputs: dict[str, ValueType]
    outputs: dict[str, ValueType]
    nodes: tuple[NodeFacts, ...]
    opset: int
    metadata: dict[str, str]

    def operators(self) -> dict[str, int]:
        """Returns how often each op type stands in the graph."""
        return dict(sorted(Counter(node.operator.rsplit(":", 1)[-1] for node in self.nodes).items()))


def read_interface(path: Path) -> GraphInterface:
    """Returns what a graph file says of itself. Raises BundleError if it is not an ONNX graph."""
    model = load_graph(path)
    try:
        return interface_of(model)
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise BundleError(f"{path} has a node that is not as ONNX defines it: {str(problem)[:120]!r}") from None


def read_inputs(path: Path) -> dict[str, ValueType]:
    """Returns the inputs alone, for who answers from a bundle and would wait for onnx_ir. Raises BundleError if the
    file is not an ONNX graph."""
    import onnx

    try:
        inputs = onnx.load(path, load_external_data=False).graph.input
    except Exception as problem:  # protobuf's errors have no common root short of Exception
        raise _not_a_graph(path, problem) from None
    found = {}
    for value in inputs:
        tensor = value.type.tensor_type
        dims = (d.dim_value if d.HasField("dim_value") else d.dim_param or "None" for d in tensor.shape.dim)
        dtype = onnx.TensorProto.DataType.Name(tensor.elem_type) if tensor.elem_type else "?"
        found[value.name] = ValueType(dtype, tuple(dims))
    return found


def interface_of(model: ir.Model) -> GraphInterface:
    """Returns the same of a graph in memory."""
    graph = model.graph
    return GraphInterface(
        {str(value.name): _type(value) for value in graph.inputs},
        {str(value.name): _type(value) for value in graph.outputs},
        tuple(_nodes(graph)),
        model.opset_imports.get("", 0),
        dict(model.metadata_props),
    )


def external_bytes(path: Path) -> int:
    """Returns how many bytes of its data file a graph's initializers are. Raises BundleError if the file is not a
    graph."""
    import onnx_ir as ir

    tensors = [value.const_value for value in load_graph(path).graph.initializers.values()]
    return sum(int(tensor.length or 0) for tensor in tensors if isinstance(tensor, ir.ExternalTensor))


def constant_values(tensor: ir.TensorProtocol, folder: Path) -> NDArray[Any]:
    """Reads the numbers of an initializer, from its data file in `folder` where they lie there.

    onnx_ir refuses files with several names, which bundles made in one pass are. Raises BundleError for a data file
    that is not in the folder, or too short.
    """
    import onnx_ir as ir

    if not isinstance(tensor, ir.ExternalTensor):
        return np.asarray(tensor.numpy())
    location, nbytes = str(tensor.location), int(tensor.length or 0)
    path = folder / location
    if Path(location).name != location or not path.is_file():
        raise BundleError(f"{tensor.name} lies in {location!r}, which is no file of {folder}")
    with path.open("rb") as file:
        file.seek(int(tensor.offset or 0))
        content = np.frombuffer(file.read(nbytes), np.uint8)
    if content.size < nbytes:
        raise BundleError(f"{path} ends before the numbers of {tensor.name}")
    if tensor.dtype.bitwidth < 8:
        levels = np.stack([content & 15, content >> 4], axis=-1).reshape(-1)[: tensor.size]
        return np.asarray((levels ^ np.uint8(8)).view(np.int8) - np.int8(8)).reshape(tensor.shape.numpy())
    return content.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy())


def save_with_data_at(graph: Path, place: Path, renamed: Callable[[str], str]) -> None:
    """Writes a graph to `place`, where the data files it was made beside have other names. Raises BundleError if the
    file is not an ONNX graph."""
    import onnx_ir as ir

    model = load_graph(graph)
    for value in model.graph.initializers.values():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                renamed(str(tensor.location)),
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=str(value.name),
            )
    ir.save(model, place)


def load_graph(path: Path) -> ir.Model:
    """Returns the graph itself, its weights left where they are. Raises BundleError if the file is not an ONNX
    graph."""
    import onnx_ir as ir

    try:
        return ir.load(path)
    except Exception as problem:  # as above, and onnx_ir's own
        raise _not_a_graph(path, problem) from None


def _not_a_graph(path: Path, problem: Exception) -> BundleError:
    return BundleError(f"{path} is not an ONNX graph: {str(problem)[:120]!r}")


def _type(value: ir.Value) -> ValueType:
    dims = value.shape or ()
    dtype = value.dtype.name if value.dtype else "?"
    return ValueType(dtype, tuple(dim if isinstance(dim, int) else str(dim.value) for dim in dims))


def _nodes(graph: ir.Graph) -> list[NodeFacts]:
    """Every node, dtypes carried from inputs and initializers through the graph."""
    import onnx_ir as ir

    given = [*graph.inputs, *graph.initializers.values()]
    dtypes = {str(value.name): _dtype(value) for value in given}
    facts = []
    for node in graph:
        if not isinstance(node.op_type, str) or not isinstance(node.domain, str):
            # What protobuf gives for bytes that are no UTF-8.
            raise ValueError(f"operator {node.op_type!r} of domain {node.domain!r} is no text")
        inputs = [str(value.name) for value in node.inputs if value is not None]
        decides = _LIKE.get(node.op_type, 0)
        dtype = dtypes.get(inputs[decides], "?") if len(inputs) > decides else "?"
        made = dtype
        if node.op_type in _TO_BOOL:
            made = "bool"
        elif node.op_type in _TO_INT64:
            made = "int64"
        elif node.op_type == "QuantizeLinear":
            made = dtypes.get(inputs[2], "?") if len(inputs) > 2 else "uint8"
        elif node.op_type == "Cast":
            made = _name(ir.DataType(node.attributes["to"].as_int()))
        dtypes |= {str(value.name): made for value in node.outputs if value.name}
        plain = {
            name: attribute.value
            for name, attribute in node.attributes.items()
            if isinstance(attribute.value, int | float | str)
        }
        operator = f"{node.domain}:{node.op_type}" if node.domain else node.op_type
        annotation = str(node.metadata_props.get("layer_ann", ""))
        # Slots up to the last one filled: an optional input that is left out still has its place.
        slots = max((k + 1 for k, value in enumerate(node.inputs) if value is not None), default=0)
        facts.append(NodeFacts(str(node.name), operator, dtype, slots, plain, annotation))
    return facts


def _dtype(value: ir.Value) -> str:
    tensor = value.const_value
    dtype = tensor.dtype if tensor is not None else value.dtype
    return _name(dtype) if dtype else "?"


def _name(dtype: ir.DataType) -> str:
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())
