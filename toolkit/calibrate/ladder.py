"""The formats a matrix may be stored in instead of its rule's, and the loss each is expected to cause."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from toolkit.quant.blockwise import QuantSpec
from toolkit.quant.mixed import Choice, spend

_BLOCK_SIZES: Final = (32, 64, 128)


@dataclass(frozen=True)
class Unit:
    """Tensors that share a format: (rows, columns) of each, the rule's format, and what was measured: `divergence` is
    the mean KLD with these alone rounded by the rule, `losses` the error of the output for each format."""

    tensors: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    spec: QuantSpec
    divergence: float
    losses: Mapping[QuantSpec, float]

    def choices(self, scale_bytes: int) -> list[Choice]:
        """Every format with its bytes, and the KLD that follows from the error of the output."""
        base = self.losses[self.spec]
        return [
            Choice(spec, self._nbytes(spec, scale_bytes), self.divergence * (loss / base if base > 0 else 1.0))
            for spec, loss in self.losses.items()
        ]

    def _nbytes(self, spec: QuantSpec, scale_bytes: int) -> int:
        total = 0
        for rows, columns in self.shapes:
            J = spec.num_blocks(columns)
            zeros = 0 if spec.symmetric and not spec.signed else -(-J * spec.bits // 8)
            total += rows * (J * (spec.block_size * spec.bits // 8 + scale_bytes) + zeros)
        return total


def formats(spec: QuantSpec, columns: int) -> list[QuantSpec]:
    """The rule's own, and for 4 bits others: narrower and wider blocks, and 8 bits. Blocks are whole wherever the
    rule's are, since some execution providers take no other. A signed one may have 8 bits and a scale a row."""
    if spec.bits != 4:
        return [spec]
    if spec.signed:
        sizes = [b for b in _BLOCK_SIZES if columns % b == 0] if spec.block_size < columns else []
        narrower = [replace(spec, block_size=b) for b in sizes if b != spec.block_size]
        return [spec, *narrower, replace(spec, bits=8, block_size=columns)]
    whole = columns % spec.block_size == 0
    sizes = [b for b in _BLOCK_SIZES if b != spec.block_size and (columns % b == 0 or not whole)]
    found = [spec, *(replace(spec, block_size=b) for b in sizes)]
    wide = [b for b in _BLOCK_SIZES if columns % b == 0 or not whole] or [spec.block_size]
    return [*found, *(replace(spec, bits=8, block_size=b) for b in {wide[0], wide[-1]})]


def spend_budget(
    units: Sequence[Unit], bits_per_weight: float, scale_bytes: Callable[[str], int]
) -> dict[str, QuantSpec]:
    """A format for every tensor, within the budget over all units; `scale_bytes` of a tensor's scales."""
    weights = sum(rows * columns for unit in units for rows, columns in unit.shapes)
    ways = {unit.tensors[0]: unit.choices(scale_bytes(unit.tensors[0])) for unit in units}
    chosen = spend(ways, int(bits_per_weight * weights / 8))
    return {tensor: chosen[unit.tensors[0]].spec for unit in units for tensor in unit.tensors}
