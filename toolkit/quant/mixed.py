"""Mixed precision: bits go where a byte buys most.

Errors of different matrices are independent and small, so the divergence they cause adds up (second order), and a
matrix' share falls with the energy of its output's error. Each matrix then has a curve of loss over bytes; walking down
the lower convex hulls of all curves, steepest step first, is the best there is at every size it passes through.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolkit.quant.blockwise import QuantSpec


@dataclass(frozen=True)
class Choice:
    """One way to store a matrix: its bytes, and the loss it is expected to cause."""

    spec: QuantSpec
    nbytes: int
    loss: float


def spend(choices: Mapping[str, Sequence[Choice]], budget_bytes: int) -> dict[str, Choice]:
    """A choice for each matrix, `budget_bytes` or less in all where the cheapest ones allow it.

    A step that does not fit is passed over for later ones that do.
    """
    hulls = {name: _hull(ways) for name, ways in choices.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget_bytes - sum(choice.nbytes for choice in chosen.values())
    steps = [
        ((a.loss - b.loss) / (b.nbytes - a.nbytes), name, k)
        for name, hull in hulls.items()
        for k, (a, b) in enumerate(itertools.pairwise(hull))
    ]
    closed: set[str] = set()
    for _, name, k in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        cost = hulls[name][k + 1].nbytes - chosen[name].nbytes
        if name in closed or cost > left:
            closed.add(name)
            continue
        chosen[name] = hulls[name][k + 1]
        left -= cost
    return chosen


def _hull(ways: Sequence[Choice]) -> list[Choice]:
    """From the smallest on, those on the lower convex hull of loss over bytes."""
    hull: list[Choice] = []
    for way in sorted(ways, key=lambda way: (way.nbytes, way.loss)):
        if hull and way.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], way) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(way)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    return (b.loss - a.loss) / (b.nbytes - a.nbytes)
