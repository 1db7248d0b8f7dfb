"""A budget over matrices: what each format of each costs in bytes and in divergence, and what is bought."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from toolkit.quant.blockwise import QuantSpec
from toolkit.quant.formats import stored_bytes
from toolkit.quant.mixed import Choice, spend


@dataclass(frozen=True)
class SharedFormat:
    """Tensors that share a format: (rows, columns) of each, the rule's format, and what was measured: `divergence` is
    the mean KLD with these alone rounded by the rule, `losses` the error of the output for each format."""

    tensors: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    spec: QuantSpec
    divergence: float
    losses: Mapping[QuantSpec, float]

    def choices(self, floats: str) -> list[Choice]:
        """Every format with its bytes, and the KLD that follows from the error of the output."""
        base = self.losses[self.spec]
        return [
            Choice(
                spec,
                sum(stored_bytes(shape, spec, floats) for shape in self.shapes),
                self.divergence * (loss / base if base > 0 else 1.0),
            )
            for spec, loss in self.losses.items()
        ]


def spend_budget(
    shared: Sequence[SharedFormat], bits_per_weight: float, floats: Callable[[str], str]
) -> dict[str, QuantSpec]:
    """A format for every tensor, within the budget over all of them; `floats` is the dtype of a tensor's scales."""
    weights = sum(rows * columns for one in shared for rows, columns in one.shapes)
    ways = {one.tensors[0]: one.choices(floats(one.tensors[0])) for one in shared}
    chosen = spend(ways, int(bits_per_weight * weights / 8))
    return {tensor: chosen[one.tensors[0]].spec for one in shared for tensor in one.tensors}
