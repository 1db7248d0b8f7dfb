"""Nodes and initializers of one graph file, and the matrix product every block is made of.

B batch, S query length, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from toolkit import names
from toolkit.checkpoint.sublayers import Moe
from toolkit.graph.layout import Layout, Slot, Unit
from toolkit.quant.blockwise import QuantSpec
from toolkit.quant.ranges import ActivationRange, uint16_parameters
from toolkit.target import Form, Stage

MS: Final = "com.microsoft"
_DTYPES: Final = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "uint4": ir.DataType.UINT4,
}
# For a graph that is looked at before any text has been read.
_UNSEEN: Final = ActivationRange(-1.0, 1.0)


class GraphBuilder:
    """Collects nodes and initializers; a node's path names its outputs `{path}/output_{k}`.

    `ranges` by point are for a form of uint16; None leaves them open, in a graph that is not to be run.
    """

    def __init__(self, layout: Layout, form: Form, ranges: Mapping[str, ActivationRange] | None = None) -> None:
        self.layout = layout
        self.form = form
        self._ranges = ranges
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._widened: dict[str, ir.Value] = {}

    @property
    def dtype(self) -> ir.DataType:
        """Returns the dtype of activations and of the KV cache."""
        return _DTYPES[self.form.activations]

    def op(
        self,
        path: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        domain: str = "",
        outputs: int = 1,
    ) -> list[ir.Value]:
        """Appends a node; the last part of `path` before any `.` is its op type. Returns its outputs."""
        values = [ir.Value(name=f"{path}/output_{k}") for k in range(outputs)]
        node = ir.node(
            path.rsplit("/", 1)[-1].split(".")[0],
            list(inputs),
            attributes or {},
            domain=domain,
            outputs=values,
            name=path,
        )
        if path.startswith(self.form.annotated):
            node.metadata_props["layer_ann"] = names.OUTSIDE_ANNOTATION
        self.nodes.append(node)
        return values

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """A small initializer inside the graph file, shared by name."""
        if name not in self.initializers:
            value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            self.initializers[name] = value
        return self.initializers[name]

    def scalar(self, name: str, number: float) -> ir.Value:
        """Adds a constant in the dtype of activations."""
        return self.constant(name, np.array(number, self.dtype.numpy()))

    def once(self, path: str, inputs: Sequence[ir.Value | None]) -> ir.Value:
        """A node's one output, made at the first call with this path."""
        made = next((node.outputs[0] for node in self.nodes if node.name == path), None)
        return made or self.op(path, inputs)[0]

    def slot(self, slot: Slot) -> ir.Value:
        """Returns the initializer that lies in a data file, declared at the first call."""
        if slot.name not in self.initializers:
            tensor = ir.ExternalTensor(
                slot.file, slot.offset, slot.nbytes, _DTYPES[slot.dtype], shape=ir.Shape(slot.shape), name=slot.name
            )
            self.initializers[slot.name] = ir.Value(name=slot.name, const_value=tensor)
        return self.initializers[slot.name]

    def scales(self, path: str, slot: Slot) -> ir.Value:
        """Returns a matrix' scales as its kernel takes them: those of bfloat16 go through a Cast, one for all who
        read them, which ONNX Runtime computes once when it opens the graph."""
        if slot.dtype != "bfloat16":
            return self.slot(slot)
        if slot.name not in self._widened:
            self._widened[slot.name] = self.cast(f"{path}/scales/Cast", self.slot(slot), ir.DataType.FLOAT)
        return self._widened[slot.name]

    def vector(self, tensor: str) -> ir.Value:
        """A gain or bias by its tensor name."""
        return self.slot(self.layout.units[tensor].slots[0])

    def cast(self, path: str, x: ir.Value, to: ir.DataType) -> ir.Value:
        """`x` in another dtype; `path` ends in Cast."""
        return self.op(path, [x], {"to": to.value})[0]

    def rounded(self, path: str, x: ir.Value, point: str) -> ir.Value:
        """`x` as uint16 and back, in the range of `point`, where the form has it so; itself elsewhere."""
        if not self.form.qdq:
            return x
        return self.between(path, x, _UNSEEN if self._ranges is None else self._ranges[point])

    def between(self, path: str, x: ir.Value, values: ActivationRange) -> ir.Value:
        """`x` as uint16 of the given range, and back."""
        scale, zero_point = uint16_parameters(values)
        parameters = [
            self.constant(f"{path}/scale", np.array(scale, self.dtype.numpy())),
            self.constant(f"{path}/zero_point", np.array(zero_point)),
        ]
        (levels,) = self.op(f"{path}/QuantizeLinear", [x, *parameters])
        return self.op(f"{path}/DequantizeLinear", [levels, *parameters])[0]

    def linear(self, path: str, x: ir.Value, module: str, form: Form | None = None) -> ir.Value:
        """`x` times a module's weight, plus its bias if it has one; `form` where it is not the graph's own.

        With signed weights the product is rounded to uint16, and the bias is added to it in the graph's dtype.
        """
        form = form or self.form
        unit = self.layout.units[names.weight(module)]
        bias = names.bias(module)
        bias_value = self.vector(bias) if bias in self.layout.units else None
        inside = bias_value if unit.spec is not None and form.bias_in_matmul else None
        y = self._product(path, x, unit, inside, form)
        return self.op(f"{path}/Add", [y, bias_value])[0] if bias_value and not inside else y

    def _product(self, path: str, x: ir.Value, unit: Unit, bias: ir.Value | None, form: Form) -> ir.Value:
        """MatMulNBits on packed weights; a float product on others."""
        if unit.spec is None:
            weight = self.slot(unit.slots[0])
            if form.fused:
                return self.op(f"{path}/FusedMatMul", [x, weight], {"transB": 1}, MS)[0]
            (turned,) = self.op(f"{path}/Transpose", [weight], {"perm": [1, 0]})
            return self.op(f"{path}/MatMul", [x, turned])[0]
        if unit.spec.signed:
            one_scale = len(unit.slots[1].shape) == 1
            blocks = {"axis": 1} if one_scale else {"axis": 0, "block_size": unit.spec.block_size}
            integers = [self.slot(slot) for slot in unit.slots]
            (weight,) = self.op(f"{path}/weight/DequantizeLinear", integers, blocks)
            (product,) = self.op(f"{path}/MatMul", [x, weight])
            return self.rounded(f"{path}/output", product, names.output_of(unit.name.removesuffix(".weight")))
        return self.packed_product(path, x, unit, unit.spec, bias, form)

    def packed_product(
        self, path: str, x: ir.Value, unit: Unit, spec: QuantSpec, bias: ir.Value | None, form: Form
    ) -> ir.Value:
        """Returns `x` times the weight of a unit that is packed in blocks, plus the bias if there is one."""
        attributes = {
            "K": unit.width,
            "N": sum(unit.rows),
            "bits": spec.bits,
            "block_size": spec.block_size,
            "accuracy_level": form.accuracy_level,
        }
        packed, scales, *zero_points = unit.slots
        weights = [self.slot(packed), self.scales(path, scales), *map(self.slot, zero_points)]
        inputs: list[ir.Value | None] = [x, *weights]
        if bias:
            inputs = [x, *weights, *[None] * (4 - len(weights)), bias]
        return self.op(f"{path}/MatMulNBits", inputs, attributes, MS)[0]

    def experts(self, path: str, x: ir.Value, logits: ir.Value, moe: Moe) -> ir.Value:
        """`x` [B, S, D] through the experts of the highest `logits` [tokens, E], weighed by the softmax over those."""
        first, last = (self.layout.units[names.weight(module)] for module in (moe.gate_up_proj, moe.down_proj))
        attributes: dict[str, Any] = {
            "k": moe.routing.per_token,
            "activation_type": "swiglu",
            "activation_alpha": moe.routing.alpha,
            "activation_beta": moe.routing.offset,
            # Rows of gate and up by turns: the CPU takes no other.
            "swiglu_fusion": 1,
            "normalize_routing_weights": 1,
        }
        if moe.routing.limit is not None:
            attributes["swiglu_limit"] = moe.routing.limit
        biases = [self._biases(module, moe) for module in (moe.gate_up_proj, moe.down_proj)]
        if first.spec is None:
            floats = [self.slot(_of_experts(unit.slots[0], moe)) for unit in (first, last)]
            given = [x, logits, floats[0], biases[0], floats[1], *([biases[1]] if biases[1] else [])]
            return self.op(f"{path}/MoE", given, attributes, MS)[0]
        quantized = {
            "expert_weight_bits": first.spec.bits,
            "block_size": first.spec.block_size,
            "accuracy_level": self.form.accuracy_level,
        }
        stacked: list[ir.Value | None] = []
        zeros: list[ir.Value | None] = []
        for unit, bias in zip((first, last), biases, strict=True):
            packed, scales, *zero_points = (_of_experts(slot, moe) for slot in unit.slots)
            where = f"{path}/{names.role_of(unit.name)}"
            stacked += [self.slot(packed), self.scales(where, scales), bias]
            zeros += map(self.slot, zero_points)
        after = [None, None, None, *zeros] if zeros else []
        inputs = [x, logits, *stacked, *after]
        while inputs[-1] is None:
            inputs.pop()
        return self.op(f"{path}/QMoE", inputs, {**attributes, **quantized}, MS)[0]

    def _biases(self, module: str, moe: Moe) -> ir.Value | None:
        """The biases [E, rows of one] of a stacked linear of a layer's experts; None where they have none."""
        if names.bias(module) not in self.layout.units:
            return None
        (slot,), count = self.layout.units[names.bias(module)].slots, moe.routing.count
        return self.slot(replace(slot, shape=(count, slot.shape[0] // count)))

    def model(self, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
        """Makes the model of the nodes and weights added so far."""
        for value in self.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            value.shape, value.dtype = tensor.shape, tensor.dtype  # type: ignore[assignment]
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": self.form.opset, MS: 1},
            name=name,
        )
        return ir.Model(graph, ir_version=10, producer_name="toolkit")


def _of_experts(slot: Slot, moe: Moe) -> Slot:
    """The rows of a layer's experts, [E, rows of one, columns]; bytes of blocks stand one behind the other."""
    count = moe.routing.count
    return replace(slot, shape=(count, slot.shape[0] // count, math.prod(slot.shape[1:])))


def value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """Returns a graph input of that shape; symbolic dimensions are names."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def declare(output: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """Makes a node's output one of the graph's, under the graph's name for it."""
    output.name, output.type, output.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    return output


@dataclass(frozen=True)
class StageGraph:
    """A stage of a target with the model that computes it."""

    stage: Stage
    model: ir.Model

    @property
    def inputs(self) -> list[str]:
        """The names of what the graph takes, in its order."""
        return [str(value.name) for value in self.model.graph.inputs]

    @property
    def outputs(self) -> list[str]:
        """The names of what the graph gives, in its order."""
        return [str(value.name) for value in self.model.graph.outputs]

    def save(self, folder: Path) -> None:
        """Writes the graph alone; its external data is where the slots say."""
        ir.save(self.model, folder / self.stage.file)
