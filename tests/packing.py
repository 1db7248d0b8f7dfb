"""What a packing pass leaves in its folder, and where a tensor's bytes lie in a data file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from toolkit.graph.layout import Layout


def journaled(folder: Path) -> list[str]:
    """The tensors that the folder's journal says are finished, in their order."""
    lines = (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["tensor"] for line in lines[1:]]


def byte_ranges(layout: Layout, tensor: str) -> Iterator[tuple[int, int]]:
    """Where a tensor's bytes begin and end: in each slot of its unit, at its rows."""
    unit = next(unit for unit in layout.units.values() if tensor in unit.sources)
    place = unit.sources.index(tensor)
    first, rows = sum(unit.rows[:place]), unit.rows[place]
    for slot in unit.slots:
        row_bytes = slot.nbytes // slot.shape[0]
        yield slot.offset + first * row_bytes, slot.offset + (first + rows) * row_bytes
