"""Each node of each stage against what its execution provider takes, by a table with its sources."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.checkpoint.config import ModelConfig
from toolkit.errors import UnsupportedError
from toolkit.graph.interface import GraphInterface, NodeFacts, read_interface
from toolkit.target import CPU_EP, TARGETS, Stage, Target
from toolkit.typed_json import from_json

_TABLE: Final = Path(__file__).with_name("operators.json")
# What computes the experts of a layer.
_EXPERTS: Final = "com.microsoft:QMoE"
_LINEAR_ATTENTION: Final = "com.microsoft:LinearAttention"


@dataclass(frozen=True)
class OperatorSupport:
    """What a provider takes of one operator: dtypes, attributes with the values they may have, attributes that must be
    absent, how many inputs, whether its blocks must be whole. `condition` is said of every node of it that is taken,
    `note` is for who reads the table."""

    types: tuple[str, ...]
    attributes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    max_inputs: int | None = None
    whole_blocks: bool = False
    condition: str = ""
    note: str = ""


@dataclass(frozen=True)
class ProviderSupport:
    """An execution provider's part of the table: where it is from and who checks it, whether every shape must be fixed,
    the lowest and highest opset, and the operators by name."""

    source: str
    checked_by: str
    static: bool
    opset: tuple[int, ...]
    operators: dict[str, OperatorSupport]


@dataclass(frozen=True)
class Placement:
    """One stage beside the table: how many nodes its provider takes, how many are the CPU's on purpose, a line for each
    kind of node that would end there unasked, and one for each that is taken on a condition."""

    stage: str
    file: str
    execution_provider: str
    nodes: int
    nodes_legal: int
    nodes_outside: int
    problems: tuple[str, ...]
    conditions: tuple[str, ...]


def bundle_placements(bundle: Path, target_name: str, window: int, parts: int = 1) -> list[Placement]:
    """Returns the rows of every stage whose graph is there, which the linter sees to. Raises BundleError for a graph
    that is broken."""
    stages = TARGETS[target_name].stages(window, parts)
    return [placement_of(read_interface(bundle / s.file), s) for s in stages if (bundle / s.file).is_file()]


def placement_of(graph: GraphInterface, stage: Stage) -> Placement:
    """Compares one stage's nodes with the table of what its execution provider takes."""
    support, cpu = support_of(stage.execution_provider), support_of(CPU_EP)
    reasons: dict[str, list[str]] = defaultdict(list)
    outside = legal = 0
    for node in graph.nodes:
        is_outside = node.annotation == names.OUTSIDE_ANNOTATION
        outside += is_outside
        reason = _refusal(node, cpu if is_outside else support)
        legal += not (is_outside or reason)
        if reason:
            reasons[f"{node.operator} {reason}"].append(node.name)
    problems = [
        f"{stage.file}: {what}, for {len(where)} node{'s' * (len(where) > 1)} such as {where[0]}"
        for what, where in reasons.items()
    ]
    problems += _graph_problems(graph, stage, support)
    return Placement(
        stage.name,
        stage.file,
        stage.execution_provider,
        len(graph.nodes),
        legal,
        outside,
        tuple(problems),
        tuple(_conditions(graph, stage, support)),
    )


def check_experts(target: Target, config: ModelConfig) -> None:
    """Raises UnsupportedError for a model with experts on a target whose execution provider does not compute them, or
    not in its activations' dtype, by the table."""
    if config.structure.experts is None:
        return
    provider = target.accelerator.execution_provider
    node = NodeFacts("", _EXPERTS, target.form.activations, 0, {}, "")
    if reason := _refusal(node, support_of(provider)):
        raise UnsupportedError(
            f"{config.model_type} has experts: {_EXPERTS} {reason} in the table of {provider}; "
            "convert it for target cpu"
        )


def check_linear_attention(target: Target, config: ModelConfig) -> None:
    """Raises UnsupportedError for a model with linear attention on a target whose execution provider does not compute
    it, by the table, or whose stages pass no states on."""
    if config.structure.delta_net is None:
        return
    provider = target.accelerator.execution_provider
    node = NodeFacts("", _LINEAR_ATTENTION, target.form.activations, 0, {}, "")
    reason = _refusal(node, support_of(provider))
    if reason or target.partitioned:
        why = f"{_LINEAR_ATTENTION} {reason} in the table of {provider}" if reason else "stages pass no states on"
        raise UnsupportedError(f"{config.model_type} has linear attention: {why}; convert it for target cpu")


@functools.cache
def support_of(execution_provider: str) -> ProviderSupport:
    """Returns what the table says of an execution provider."""
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    return from_json(ProviderSupport, table[execution_provider], execution_provider)


def _refusal(node: NodeFacts, support: ProviderSupport) -> str:
    """Why the provider would not run a node as it stands, or nothing."""
    row = support.operators.get(node.operator)
    if row is None:
        return "is not among its operators"
    if node.dtype not in row.types:
        return f"is taken in {_words(row.types)}, not in {node.dtype}"
    for name, allowed in row.attributes.items():
        if name in node.attributes and node.attributes[name] not in allowed:
            return f"is taken with {name} {_words(allowed)}, not {node.attributes[name]}"
    for name in row.absent:
        if name in node.attributes:
            return f"is not taken with {name} written"
    if row.max_inputs is not None and node.inputs > row.max_inputs:
        return f"is taken with {row.max_inputs} inputs at most, not {node.inputs}"
    return _cut_block(node) if row.whole_blocks else ""


def _cut_block(node: NodeFacts) -> str:
    """Why a product of blocks is not taken whose last one is not whole, or whose sizes do not stand in it."""
    k, block_size = (node.attributes.get(key) for key in ("K", "block_size"))
    if not isinstance(k, int) or not isinstance(block_size, int) or block_size < 1:
        return f"needs K and block_size as numbers, not {k!r:.20} and {block_size!r:.20}"
    return f"needs a block_size that divides K {k}, not {block_size}" if k % block_size else ""


def _graph_problems(graph: GraphInterface, stage: Stage, support: ProviderSupport) -> list[str]:
    problems = []
    low, high = support.opset
    if not low <= graph.opset <= high:
        problems.append(f"{stage.file}: opset {graph.opset}, {stage.execution_provider}'s table is for {low} to {high}")
    loose = [name for name, value in graph.inputs.items() if any(isinstance(dim, str) for dim in value.shape)]
    if support.static and loose:
        problems.append(f"{stage.file}: input {loose[0]} has no fixed shape, which {stage.execution_provider} needs")
    return problems


def _conditions(graph: GraphInterface, stage: Stage, support: ProviderSupport) -> list[str]:
    rows = {node.operator: support.operators.get(node.operator) for node in graph.nodes}
    return [f"{stage.file}: {name} {row.condition}" for name, row in rows.items() if row and row.condition]


def _words(values: Sequence[object]) -> str:
    return " or ".join(map(str, values))
