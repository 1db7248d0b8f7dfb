"""A budget over matrices: what each format of each costs in bytes and in divergence, and what is bought."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from toolkit import names
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

    def solved(self) -> SharedFormat:
        """Returns these with the formats that are solved alone, where they are a layer's and their rule is."""
        if names.layer_of(self.tensors[0]) is None or not self.spec.rounded_by.solves:
            return self
        return replace(self, losses={spec: loss for spec, loss in self.losses.items() if spec.rounded_by.solves})

    def most_bytes(self, floats: str) -> int:
        """Returns what they weigh in the narrowest blocks, of as many bits as their rule has."""
        return max(choice.nbytes for choice in self.choices(floats) if choice.spec.bits == self.spec.bits)

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
    """A format for every tensor, within the budget over all of them; `floats` is the dtype of a tensor's scales.

    Matrices of layers that are solved get 8 bits, which are not, only by what is left of a budget that has bought every
    one the narrowest blocks: 8 bits do not make up for what arrives changed from layers before, which no probe of a
    matrix alone shows (LOG.md).
    """
    weights = sum(rows * columns for one in shared for rows, columns in one.shapes)
    budget = int(bits_per_weight * weights / 8)
    is_beyond = budget > sum(one.most_bytes(floats(one.tensors[0])) for one in shared)
    offered = shared if is_beyond else [one.solved() for one in shared]
    chosen = spend({one.tensors[0]: one.choices(floats(one.tensors[0])) for one in offered}, budget)
    return {tensor: chosen[one.tensors[0]].spec for one in shared for tensor in one.tensors}
