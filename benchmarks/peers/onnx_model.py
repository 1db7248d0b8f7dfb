"""The builder's ONNX model: its weights for the reference, and its logits as it runs.

Linears are MatMulNBits in the layout of toolkit/quant/blockwise.py. The embedding is a float Gather (0.18.0 takes
`op_types_to_quantize=MatMul/Gather` and leaves it as it is), of a tied model a GatherBlockQuantized over the LM head's
own numbers. T tokens, V vocab.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

from benchmarks.peers.tool import PeerError
from toolkit import names
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.weights import expected_tensors
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, dequantize_blocks

_LAYER_NODE: Final = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+)_proj/MatMul\w*$")
_MODULES: Final = {"attn": "self_attn", "mlp": "mlp"}
_FUSED: Final = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


@dataclass(frozen=True)
class _Matrix:
    """A node with its constants by input (None where it has none), and which rows of it one checkpoint tensor is."""

    node: onnx.NodeProto
    constants: tuple[NDArray[Any] | None, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """All of the node's constants, scales and zero points included."""
        return sum(constant.nbytes for constant in self.constants if constant is not None)


class ONNXWeights:
    """`Tensors`: the model's matrices dequantized; vectors are the checkpoint's, which the builder keeps as float32.

    `config` has a head of its own, since a float embedding may stand beside the tied head's numbers. Raises PeerError
    for a graph whose matrices are not where this builder puts them.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint) -> None:
        self._source = checkpoint.source
        self._matrices = _matrices(onnx.load(path), checkpoint.config)
        for name, shape in expected_tensors(checkpoint.config).items():
            if len(shape) == 2 and name not in self._matrices:
                raise PeerError(f"{path} holds {name} in no MatMulNBits or Gather of the names the builder gives")
        own_head = names.weight(names.LM_HEAD) in self._matrices
        self.config = replace(checkpoint.config, tie_word_embeddings=not own_head)

    def names(self) -> list[str]:
        """Every tensor, the model's own LM head included."""
        return list(dict.fromkeys([*self._source.names(), *self._matrices]))

    def read(self, name: str) -> NDArray[np.float32]:
        """Reads a whole tensor as float32, dequantized."""
        if name not in self._matrices:
            return self._source.read(name)
        matrix = self._matrices[name]
        return self.read_rows(name, 0, matrix.stop - matrix.start)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of a tensor: blocks never cross them."""
        if name not in self._matrices:
            return self._source.read_rows(name, start, stop)
        matrix = self._matrices[name]
        return _dequantized(matrix, slice(matrix.start + start, matrix.start + stop))

    def matrix_bytes(self) -> int:
        """What the matrices take in the file, scales and zero points included."""
        return sum(matrix.nbytes for matrix in self._stored())

    def linear_bits_per_weight(self) -> float:
        """Of the linears alone, the LM head among them: without the embedding, which the builder leaves as float32."""
        linears = [matrix for matrix in self._stored() if matrix.node.op_type == "MatMulNBits"]
        shapes = [_attributes(matrix.node) for matrix in linears]
        return 8 * sum(m.nbytes for m in linears) / sum(int(shape["N"]) * int(shape["K"]) for shape in shapes)

    def formats(self) -> Counter[str]:
        """How many stored matrices have each format; q, k and v are stored as one."""
        return Counter(_format(matrix.node) for matrix in self._stored())

    def _stored(self) -> list[_Matrix]:
        """Each node once, however many tensors are stacked in it."""
        return list({matrix.node.name: matrix for matrix in self._matrices.values()}.values())


class ONNXLogits:
    """The model as ONNX Runtime runs it on the CPU, activations rounded to int8 where its nodes ask for that.

    Raises PeerError if ONNX Runtime does not take it.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._head_dim = config.head_dim
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what fails is raised, and said once
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as problem:  # whatever the runtime throws
            raise PeerError(f"onnxruntime does not open it: {_reason(problem)}") from None

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """[T, V] of every position of one sequence. Raises PeerError if the model fails on it."""
        feeds: dict[str, NDArray[Any]] = {
            names.INPUT_IDS: np.array([ids], np.int64),
            names.ATTENTION_MASK: np.ones((1, len(ids)), np.int64),
        }
        for value in self._session.get_inputs():
            if value.name.startswith("past_key_values."):
                feeds[value.name] = np.zeros((1, int(value.shape[1]), 0, self._head_dim), np.float32)
        try:
            made = self._session.run([names.LOGITS], feeds)[0]
        except Exception as problem:
            raise PeerError(f"onnxruntime does not run it: {_reason(problem)}") from None
        logits: NDArray[np.float32] = np.asarray(made, np.float32)[0]
        return logits


def _matrices(model: onnx.ModelProto, config: ModelConfig) -> dict[str, _Matrix]:
    """By the checkpoint's names."""
    constants = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    out_features = {
        "q": config.q_size,
        "k": config.kv_size,
        "v": config.kv_size,
        "o": config.hidden_size,
        "gate": config.intermediate_size,
        "up": config.intermediate_size,
        "down": config.hidden_size,
    }
    found: dict[str, _Matrix] = {}
    shared_scales = ""
    for node in model.graph.node:
        held = tuple(constants.get(name) for name in node.input)
        if node.op_type == "Gather" and node.name.startswith("/model/embed_tokens/"):
            found[names.weight(names.EMBED_TOKENS)] = _Matrix(node, held, 0, config.vocab_size)
        if node.op_type == "GatherBlockQuantized" and node.name.startswith("/model/embed_tokens/"):
            shared_scales = node.input[2]
        if node.op_type != "MatMulNBits":
            continue
        if node.name.startswith("/lm_head/"):
            found[names.weight(names.LM_HEAD)] = _Matrix(node, held, 0, config.vocab_size)
        elif match := _LAYER_NODE.match(node.name):
            start, (layer_index, group, stacked) = 0, match.groups()
            for part in _FUSED.get(stacked, (stacked,)):
                module = names.layer_module(int(layer_index), f"{_MODULES[group]}.{part}_proj")
                found[names.weight(module)] = _Matrix(node, held, start, start + out_features[part])
                start += out_features[part]
    head = found.get(names.weight(names.LM_HEAD))
    if shared_scales and head and head.node.input[2] == shared_scales:
        found[names.weight(names.EMBED_TOKENS)] = head
    return found


def _dequantized(matrix: _Matrix, rows: slice) -> NDArray[np.float32]:
    if matrix.node.op_type == "Gather":
        embedding: NDArray[np.float32] = np.asarray(matrix.constants[0], np.float32)[rows]
        return embedding
    attributes = _attributes(matrix.node)
    spec = QuantSpec(attributes["bits"], attributes["block_size"])
    _, packed, scales, *rest = matrix.constants
    zero_points = rest[0] if rest else None
    if packed is None or scales is None or any(constant is not None for constant in rest[1:]):
        raise PeerError(f"{matrix.node.name} has g_idx or no constant weights: not what the builder is known to write")
    J = spec.num_blocks(attributes["K"])
    zeros = None if zero_points is None else zero_points.reshape(attributes["N"], -1)[rows]
    blocks = QuantizedBlocks(packed[rows], scales.reshape(-1, J)[rows].astype(np.float32), zeros, 0.0)
    return dequantize_blocks(blocks, spec, attributes["K"])


def _format(node: onnx.NodeProto) -> str:
    if node.op_type == "Gather":
        return "float32 embedding"
    zero_points = len(node.input) > 3 and bool(node.input[3])
    return f"{_attributes(node)['bits']}-bit{' with zero points' if zero_points else ''}"


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _reason(problem: Exception) -> str:
    """The kernel's own words where ORT's message ends in them."""
    return str(problem).strip().splitlines()[0].rpartition("Status Message: ")[2][:200]
