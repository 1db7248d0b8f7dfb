"""What became of the weights: report.json's `quantization` and `partition`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypedDict

from toolkit import names
from toolkit.bundle.compiled import binary_of
from toolkit.bundle.operators import placement_of, support_of
from toolkit.graph.builder import StageGraph
from toolkit.graph.interface import interface_of, read_interface
from toolkit.graph.layout import Layout, Unit
from toolkit.report.sections import CeilingRow, PartitionRow
from toolkit.report.weight_sections import Format, Quantization, RoleRow, TensorRow
from toolkit.soc import Soc


class _Noise(TypedDict, total=False):
    """The error of a row: one of the two."""

    sqnr_db: float
    exact: bool


class SquaredError(Protocol):
    """Sums of squares of one checkpoint tensor and of its quantization error."""

    @property
    def tensor(self) -> str:
        """The name of the tensor in the checkpoint."""

    @property
    def signal(self) -> float:
        """The sum of the squares of its weights."""

    @property
    def noise(self) -> float:
        """The sum of the squares of what quantizing changed."""


def quantization_section(layout: Layout, errors: Sequence[SquaredError]) -> Quantization:
    """Bits, bytes and signal-to-noise (dB, of the weights, unweighted) by role and by tensor."""
    sums = {error.tensor: (error.signal, error.noise) for error in errors}
    tensors = []
    groups: dict[tuple[str, Format], list[tuple[str, int]]] = defaultdict(list)
    for unit in layout.matrices():
        unit_bytes, form = sum(slot.nbytes for slot in unit.slots), _format(unit)
        for source, rows in zip(unit.sources, unit.rows, strict=True):
            role = names.role_of(source)
            row = TensorRow(**vars(form), name=source, role=role, layer=names.layer_of(source))
            tensors.append(row if unit.spec is None else replace(row, **_decibel(*sums[source])))
            groups[role, form].append((source, unit_bytes * rows // sum(unit.rows)))
    by_role = []
    for (role, form), members in groups.items():
        nbytes = sum(nbytes for _, nbytes in members)
        summed = RoleRow(**vars(form), role=role, tensors=len(members), bytes=nbytes)
        noise = _decibel(*(sum(sums[source][k] for source, _ in members) for k in (0, 1))) if form.bits < 32 else {}
        by_role.append(replace(summed, **noise))
    return Quantization(
        bits_per_weight=layout.bits_per_weight(),
        weight_bytes=sum(row.bytes for row in by_role),
        by_role=tuple(by_role),
        tensors=tuple(tensors),
    )


def partition_section(graphs: Sequence[StageGraph]) -> tuple[PartitionRow, ...]:
    """Each stage beside the table of what its execution provider takes.

    `nodes_legal` is what the table allows, `nodes_outside` what is left to the CPU on purpose; `illegal` has a line for
    each kind of node that would end there unasked, `conditions` for each that is taken only if.
    """
    rows = []
    for graph in graphs:
        stage, placement = graph.stage, placement_of(interface_of(graph.model), graph.stage)
        rows.append(
            PartitionRow(
                stage=stage.name,
                file=stage.file,
                ep=stage.execution_provider,
                device=stage.device,
                nodes=placement.nodes,
                nodes_legal=placement.nodes_legal,
                nodes_outside=placement.nodes_outside,
                illegal=placement.problems,
                conditions=placement.conditions,
                table=support_of(stage.execution_provider).source,
                compiled=False,
            )
        )
    return tuple(rows)


def compiled_rows(rows: Sequence[PartitionRow], bundle: Path, stages: Sequence[str]) -> tuple[PartitionRow, ...]:
    """The rows of a partition with what became of these stages: EPContext took every node, or they would not be."""
    changed = []
    for row in rows:
        if row.stage in stages:
            file = names.compiled_file(row.stage)
            binary = binary_of(read_interface(bundle / file))
            row = replace(
                row,
                file=file,
                compiled=True,
                bin=binary,
                bin_bytes=(bundle / binary).stat().st_size,
                nodes_on_ep=row.nodes,
                nodes_run=row.nodes,
                conditions=(),
            )
        changed.append(row)
    return tuple(changed)


def ceiling_section(layout: Layout, soc: Soc) -> tuple[CeilingRow, ...]:
    """What memory bandwidth allows. The KV cache comes on top, and what a device measures lies below."""
    return (ceiling_row(weight_bytes_per_token(layout), soc),)


def weight_bytes_per_token(layout: Layout) -> int:
    """How many bytes of weights a token reads: every matrix but the embedding, of which it reads a row; a tied
    embedding is read as the LM head."""
    matrices = layout.matrices()
    tied = not any(names.role_of(unit.name) == "lm_head" for unit in matrices)
    read = [unit for unit in matrices if tied or names.role_of(unit.name) != "embed_tokens"]
    return sum(slot.nbytes for unit in read for slot in unit.slots)


def ceiling_row(weight_bytes_per_token: int, soc: Soc) -> CeilingRow:
    """The bound that one SoC's memory bandwidth sets on decoding, as a row of `ceiling`."""
    return CeilingRow(
        device=soc.device,
        memory_bytes_per_s=soc.memory_bytes_per_s,
        source=soc.memory_source,
        weight_bytes_per_token=weight_bytes_per_token,
        decode_tokens_per_s=soc.memory_bytes_per_s / weight_bytes_per_token,
        basis="an upper bound by memory bandwidth over the bytes of weights a token reads, not a measurement",
    )


def _format(unit: Unit) -> Format:
    spec = unit.spec
    return Format("none", 32) if spec is None else Format(spec.algorithm, spec.bits, spec.block_size, spec.symmetric)


def _decibel(signal: float, noise: float) -> _Noise:
    """10 log10(signal / noise), or that the tensor is exact."""
    if noise > 0 and signal > 0:
        return {"sqnr_db": 10 * math.log10(signal / noise)}
    return {"exact": True}
