"""A traced graph made a bundle's: its weights where the layout says, its products and look-ups on packed ones.

Everything else stays as torch's exporter wrote it, attention in plain operators. N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir
import onnx_ir.passes.common as passes

from toolkit import names
from toolkit.algorithms import MatrixUse
from toolkit.errors import UnsupportedError
from toolkit.graph.blocks import last_position, looked_up
from toolkit.graph.builder import MS, GraphBuilder, declare
from toolkit.graph.decoder import mask_lengths
from toolkit.graph.layout import Layout, Unit, slots_from
from toolkit.quant.blockwise import QuantSpec
from toolkit.quant.formats import matrix_spec, stored_arrays
from toolkit.recipe import Recipe
from toolkit.target import Form, Target

# What may stand between the LM head and the logits: each acts on every number by itself.
_BY_NUMBER: Final = ("Add", "Cast", "CastLike", "Div", "Identity", "Mul", "Sub", "Tanh")


@dataclass(frozen=True)
class TracedGraph:
    """The graph as it was traced, without weights. `shapes` has each tensor that it reads by its initializer's name,
    `tensors` what the checkpoint calls it; `uses` are the matrices that may be packed, and what each is for."""

    model: ir.Model
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, str]
    uses: Mapping[str, MatrixUse]


def read_traced(model: ir.Model, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, str]) -> TracedGraph:
    """A traced graph with what its matrices are for: a linear's is read turned, by products alone, an embedding's by
    its rows. One that is read in any other way keeps its floats."""
    uses = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and (use := _use_of(model.graph.initializers[name])):
            uses[name] = use
    return TracedGraph(model, shapes, tensors, uses)


def _use_of(weight: ir.Value) -> MatrixUse | None:
    kinds = {_read_as(node, index) for node, index in weight.uses()}
    if kinds == {MatrixUse.LINEAR, MatrixUse.EMBEDDING}:
        return MatrixUse.TIED_EMBEDDING
    return kinds.pop() if len(kinds) == 1 else None


def _read_as(node: ir.Node, index: int) -> MatrixUse | None:
    """What a node reads a matrix [N, K] as; None for what packed weights have no operator for."""
    if node.op_type == "Gather" and index == 0 and _integer(node, "axis", 0) == 0:
        return MatrixUse.EMBEDDING
    if node.op_type != "Transpose":
        return None
    turned = node.outputs[0]
    products = all(user.op_type == "MatMul" and place == 1 for user, place in turned.uses())
    return MatrixUse.LINEAR if products and turned.uses() else None


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def plan_traced_layout(traced: TracedGraph, target: Target, recipe: Recipe | None) -> Layout:
    """The layout of what a traced graph reads, one unit a tensor; `recipe` None quantizes nothing.

    Raises RecipeError as `matrix_spec` does.
    """
    form, file = target.form, names.MODEL_DATA_FILE
    units: dict[str, Unit] = {}
    end = 0
    for name, shape in traced.shapes.items():
        tensor, use = traced.tensors[name], traced.uses.get(name)
        spec: QuantSpec | None = matrix_spec(tensor, shape, use, recipe, form) if use and recipe else None
        slots, end = slots_from(tensor, stored_arrays(shape, spec, form.activations), file, end)
        width = shape[1] if len(shape) == 2 else 1
        units[tensor] = Unit(tensor, (tensor,), (shape[0],), width, spec, slots)
    return Layout(units, {file: end})


def build_traced(traced: TracedGraph, layout: Layout, form: Form) -> ir.Model:
    """The graph of a bundle: weights in its data file, logits of each row's last position [B, 1, V] alone.

    The traced graph is used up. Raises UnsupportedError if the logits are not a linear's output.
    """
    graph, build = traced.model.graph, GraphBuilder(layout, form)
    declared = graph.outputs[0].shape
    assert declared is not None
    vocab_size = int(declared[2])  # type: ignore[arg-type]
    given = {str(value.name): value for value in graph.inputs}
    _cut_to_last(graph, build, given)
    for name in traced.uses:
        unit = layout.units[traced.tensors[name]]
        if unit.spec is not None:
            _pack(graph, build, graph.initializers[name], unit)
    for name in traced.shapes:
        weight = graph.initializers.pop(name)
        if weight.uses():
            weight.replace_all_uses_with(build.slot(layout.units[traced.tensors[name]].slots[0]))
    return _assembled(traced.model, build, vocab_size)


def _cut_to_last(graph: ir.Graph, build: GraphBuilder, given: Mapping[str, ir.Value]) -> None:
    """The head gets each row's last position alone."""
    head = _head(graph)
    _, _, index, _, _ = mask_lengths(build, given[names.INPUT_IDS], given[names.ATTENTION_MASK])
    hidden = head.inputs[0]
    assert hidden is not None
    head.replace_input_with(0, last_position(build, hidden, index))
    graph.insert_before(head, _taken(build))


def _head(graph: ir.Graph) -> ir.Node:
    """The product that makes the logits."""
    node = graph.outputs[0].producer()
    while node is not None and node.op_type in _BY_NUMBER:
        made = [value.producer() for value in node.inputs if value is not None and value.producer() is not None]
        node = made[0] if len(made) == 1 else None
    if node is None or node.op_type != "MatMul":
        raise UnsupportedError("the traced graph's logits are no linear's output: onnxruntime-genai needs those of one")
    return node


def _pack(graph: ir.Graph, build: GraphBuilder, weight: ir.Value, unit: Unit) -> None:
    """Products and look-ups on packed weights in place of those that read a matrix of floats."""
    for k, (node, place) in enumerate(list(_readers(weight))):
        path = f"/{unit.name.removesuffix('.weight').replace('.', '/')}{f'.{k}' if k else ''}"
        other = node.inputs[1 - place]
        assert other is not None
        if node.op_type == "Gather":
            made = looked_up(build, path, unit, other)
        else:
            assert unit.spec is not None
            made = build.packed_product(path, other, unit, unit.spec, None, build.form)
        graph.insert_before(node, _taken(build))
        node.outputs[0].replace_all_uses_with(made, replace_graph_outputs=True)


def _readers(weight: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The look-ups and products that read a matrix, turned or not, and at which input."""
    for node, index in weight.uses():
        if node.op_type == "Transpose":
            yield from node.outputs[0].uses()
        else:
            yield node, index


def _taken(build: GraphBuilder) -> list[ir.Node]:
    """The nodes that were made since the last call."""
    nodes, build.nodes = build.nodes, []
    return nodes


def _assembled(model: ir.Model, build: GraphBuilder, vocab_size: int) -> ir.Model:
    """The graph under onnxruntime-genai's names, with the new initializers and without what nothing reads."""
    graph = model.graph
    for value in build.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        value.shape, value.dtype = tensor.shape, tensor.dtype  # type: ignore[assignment]
        graph.register_initializer(value)
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    declare(graph.outputs[0], names.LOGITS, ir.DataType.FLOAT, ("batch", 1, vocab_size))
    passes.RemoveUnusedNodesPass()(model)
    model.ir_version, model.producer_name = 10, "toolkit"
    graph.opset_imports.update({"": build.form.opset, MS: 1})
    return model
