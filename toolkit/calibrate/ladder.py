"""A budget over matrices: what each format of each costs in bytes and in divergence, and what is bought."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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

    def gives_up(self, spec: QuantSpec) -> bool:
        """Whether a format is not solved, of matrices of a layer that are by their rule."""
        of_layer = names.layer_of(self.tensors[0]) is not None
        return of_layer and self.spec.rounded_by.solves and not spec.rounded_by.solves


def spend_budget(
    shared: Sequence[SharedFormat], bits_per_weight: float, floats: Callable[[str], str]
) -> dict[str, QuantSpec]:
    """A format for every tensor, within the budget over all of them; `floats` is the dtype of a tensor's scales.

    Matrices of layers that are solved get 8 bits, which are not, only by what such formats as are solved leave of the
    budget: 8 bits do not make up for what arrives changed from layers before, which no probe of a matrix alone shows
    (LOG.md).
    """
    weights = sum(rows * columns for one in shared for rows, columns in one.shapes)
    budget = int(bits_per_weight * weights / 8)
    solved, others = dict[str, list[Choice]](), dict[str, list[Choice]]()
    for one in shared:
        choices = one.choices(floats(one.tensors[0]))
        solved[one.tensors[0]] = [choice for choice in choices if not one.gives_up(choice.spec)]
        others[one.tensors[0]] = [choice for choice in choices if one.gives_up(choice.spec)]
    first = spend(solved, budget)
    chosen = spend({name: [choice, *others[name]] for name, choice in first.items()}, budget)
    return {tensor: chosen[one.tensors[0]].spec for one in shared for tensor in one.tensors}
