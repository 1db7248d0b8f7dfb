"""What became of the weights: report.json's `quantization` and `partition`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

from toolkit import names
from toolkit.bundle.operators import place, support_of
from toolkit.graph.builder import StageGraph
from toolkit.graph.interface import interface_of
from toolkit.graph.layout import Layout, Unit
from toolkit.soc import Soc


class SquaredError(Protocol):
    """Sums of squares of one checkpoint tensor and of its quantization error."""

    @property
    def tensor(self) -> str: ...
    @property
    def signal(self) -> float: ...
    @property
    def noise(self) -> float: ...


def quantization_section(layout: Layout, errors: Sequence[SquaredError]) -> dict[str, Any]:
    """Bits, bytes and signal-to-noise (dB, of the weights, unweighted) by role and by tensor."""
    sums = {error.tensor: (error.signal, error.noise) for error in errors}
    tensors = []
    groups: dict[tuple[Any, ...], list[tuple[str, int]]] = defaultdict(list)
    for unit in layout.matrices():
        unit_bytes = sum(slot.nbytes for slot in unit.slots)
        for source, rows in zip(unit.sources, unit.rows, strict=True):
            entry = {"name": source, "role": names.role_of(source), **_format(unit)}
            if (layer := names.layer_of(source)) is not None:
                entry["layer"] = layer
            if unit.spec is not None:
                entry |= _decibel(*sums[source])
            tensors.append(entry)
            key = (entry["role"], tuple(_format(unit).items()))
            groups[key].append((source, unit_bytes * rows // sum(unit.rows)))
    by_role = []
    for (role, spec), members in groups.items():
        row = {"role": role, **dict(spec)}
        row |= {"tensors": len(members), "bytes": sum(nbytes for _, nbytes in members)}
        if row["bits"] < 32:
            row |= _decibel(*(sum(sums[source][k] for source, _ in members) for k in (0, 1)))
        by_role.append(row)
    weight_bytes = sum(row["bytes"] for row in by_role)
    return {
        "bits_per_weight": layout.bits_per_weight(),
        "weight_bytes": weight_bytes,
        "by_role": by_role,
        "tensors": tensors,
    }


def partition_section(graphs: Sequence[StageGraph]) -> list[dict[str, Any]]:
    """Each stage beside the table of what its execution provider takes.

    `nodes_legal` is what the table allows, `nodes_outside` what is left to the CPU on purpose; `illegal` has a line for
    each kind of node that would end there unasked, `conditions` for each that is taken only if.
    """
    rows = []
    for graph in graphs:
        placement = place(interface_of(graph.model), graph.stage)
        rows.append(
            {
                "stage": graph.stage.name,
                "file": graph.stage.file,
                "ep": graph.stage.execution_provider,
                "device": graph.stage.device,
                "nodes": placement.nodes,
                "nodes_legal": placement.nodes_legal,
                "nodes_outside": placement.nodes_outside,
                "illegal": list(placement.problems),
                "conditions": list(placement.conditions),
                "table": support_of(graph.stage.execution_provider)["source"],
                "compiled": False,
            }
        )
    return rows


def ceiling_section(layout: Layout, soc: Soc) -> list[dict[str, Any]]:
    """What memory bandwidth allows: each token reads every matrix but the embedding, of which it reads a row.

    A tied embedding is read as the LM head. The KV cache comes on top, and what a device measures lies below.
    """
    matrices = layout.matrices()
    tied = not any(names.role_of(unit.name) == "lm_head" for unit in matrices)
    read = [unit for unit in matrices if tied or names.role_of(unit.name) != "embed_tokens"]
    nbytes = sum(slot.nbytes for unit in read for slot in unit.slots)
    return [ceiling_row(nbytes, soc)]


def ceiling_row(weight_bytes_per_token: int, soc: Soc) -> dict[str, Any]:
    """The bound that one SoC's memory bandwidth sets on decoding, as a row of `ceiling`."""
    return {
        "device": soc.device,
        "memory_bytes_per_s": soc.memory_bytes_per_s,
        "source": soc.memory_source,
        "weight_bytes_per_token": weight_bytes_per_token,
        "decode_tokens_per_s": soc.memory_bytes_per_s / weight_bytes_per_token,
        "basis": "an upper bound by memory bandwidth over the bytes of weights a token reads, not a measurement",
    }


def _format(unit: Unit) -> dict[str, Any]:
    if unit.spec is None:
        return {"algorithm": "none", "bits": 32}
    spec = unit.spec
    return {"algorithm": spec.algorithm, "bits": spec.bits, "block_size": spec.block_size, "symmetric": spec.symmetric}


def _decibel(signal: float, noise: float) -> dict[str, Any]:
    """10 log10(signal / noise), or that the tensor is exact."""
    return {"sqnr_db": 10 * math.log10(signal / noise)} if noise > 0 and signal > 0 else {"exact": True}
