"""The page's section on weights: the heat map over layers and roles, and the table of formats."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.report import charts
from toolkit.report.charts import Cell
from toolkit.report.weight_sections import Quantization, RoleRow, TensorRow, Tuned


@dataclass(frozen=True)
class HeatMap:
    """The chart with its legend, and the same as a table; `scale_bits` is the width its colours are for."""

    figure: str
    legend: str
    scale_bits: float | None
    mixed: bool
    hatched: bool
    roles: list[str]
    table: list[tuple[int, list[Cell | None]]]
    worst: Cell | None


@dataclass(frozen=True)
class FormatRow:
    """A row of the table of formats, its share of the bytes, and a strip of the SQNR of its own tensors."""

    row: RoleRow
    share: float | None
    strip: str


@dataclass(frozen=True)
class QuantizationView:
    """All of the section; `strip_range` names the ends of the strips' axis, and is empty without one."""

    heat_map: HeatMap | None
    rows: list[FormatRow]
    strip_range: str
    notes: list[str]


def quantization_view(section: Quantization) -> QuantizationView:
    """What the page shows of the weights."""
    cells = [Cell(t.layer, t.role, t.bits, t.sqnr_db) for t in section.tensors if t.layer is not None]
    scale = charts.heat_scale(cells)
    total = sum(row.bytes for row in section.by_role)
    rows = [
        FormatRow(row, row.bytes / total if total else None, _strip(row, section.tensors, scale) if scale else "")
        for row in section.by_role
    ]
    ends = f"{scale.edges[0]:g} to {scale.edges[-1]:g} dB" if scale else ""
    return QuantizationView(_heat_map(cells, scale) if cells else None, rows, ends, _notes(section))


def own_tensors(row: RoleRow, tensors: Sequence[TensorRow]) -> list[TensorRow]:
    """The tensors that a row of the table of formats counts: those of its role in its whole format."""
    return [tensor for tensor in tensors if _key(tensor) == _key(row)]


def _key(row: RoleRow | TensorRow) -> tuple[object, ...]:
    return row.role, row.algorithm, row.bits, row.block_size, row.symmetric


def _strip(row: RoleRow, tensors: Sequence[TensorRow], scale: charts.Scale) -> str:
    """The tensors of one row on the axis of the heat map; empty for a bit width the axis is not for."""
    values = [tensor.sqnr_db for tensor in own_tensors(row, tensors) if tensor.sqnr_db is not None]
    if not values or row.bits != scale.bits:
        return ""
    label = f"{row.role}: {len(values)} tensors from {min(values):.1f} to {max(values):.1f} dB"
    return charts.dot_strip(values, scale.edges[0], scale.edges[-1], label, statistics.median(values))


def _heat_map(cells: list[Cell], scale: charts.Scale | None) -> HeatMap:
    # In the order of the report, which is that of the data files.
    roles = list(dict.fromkeys(cell.role for cell in cells))
    layers = max(cell.layer for cell in cells) + 1
    label = f"Signal to quantization noise of {len(cells)} weight tensors, {layers} layers by {len(roles)} roles"
    by_place = {(cell.layer, cell.role): cell for cell in cells}
    known = [cell for cell in cells if cell.sqnr_db is not None]
    return HeatMap(
        figure=charts.heat_map(cells, roles, scale, label),
        legend=charts.heat_legend(scale) if scale else "",
        scale_bits=scale.bits if scale else None,
        mixed=any(scale and cell.bits != scale.bits for cell in known),
        hatched=len(known) < len(cells),
        roles=roles,
        table=[(layer, [by_place.get((layer, role)) for role in roles]) for layer in range(layers)],
        worst=min(known, key=lambda cell: cell.sqnr_db or 0.0, default=None),
    )


def _notes(section: Quantization) -> list[str]:
    """How the formats came about, and what a reader should know of them."""
    notes = []
    if source := section.source:
        notes.append(
            f"The checkpoint is {source.words}: everything here is "
            "compared with its dequantized weights, not with those that the file was made from."
        )
    if made := section.calibration:
        budget = made.budget_bits_per_weight
        spent = f"; {budget:g} bits per weight, spent where they help most" if budget else ""
        notes.append(
            f"Quality {made.quality}: {made.tokens:,} tokens of {made.text}, channel scales folded into "
            f"{len(made.folded)} of {made.inputs} inputs{spent}."
        )
        if seen := made.experts:
            notes.append(
                f"The text's tokens came to {seen.experts:,} experts, {seen.fewest:,} to {seen.most:,} to each, "
                f"{seen.median:,} in the median; {seen.searched:,} of them saw fewer than {seen.needed} and were "
                "searched without the text."
            )
        notes += [f"{row.tensor} was searched, not solved: {row.reason}." for row in made.fallbacks]
        notes += [_tuned(made.tuned)] if made.tuned else []
    if salient := section.salient_inputs:
        turned = " Rotated for their sake, which mends a part." if section.rotated else ""
        notes.append(
            f"Rounded without data, and {len(salient)} norms have gains many times their median: what reads such "
            f"channels suffers most.{turned} Export with --quality balanced."
        )
    return notes


def _tuned(made: Tuned) -> str:
    """What the steps at the end brought, in a sentence."""
    begun = f"Scales and gains were tuned in {made.steps} steps by the mean KLD to the checkpoint"
    if made.kld_after < made.kld_before:
        return (
            f"{begun}: on {made.tokens:,} tokens left out of the text it went from {made.kld_before:.4g} to "
            f"{made.kld_after:.4g}, the weights alone."
        )
    return f"{begun}, and left as they were: {made.tokens:,} tokens left out of the text gained nothing by it."
