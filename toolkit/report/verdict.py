"""Whether a bundle passes: the figures of its report beside their thresholds.

A share of questions is known to within its standard error alone, so a gate on one asks whether the sample shows the
bundle to be worse than the threshold, at 95% confidence one-sided: one question lost of ten shows nothing, thirty of
five hundred do. What is held against the threshold is the `bound` of a check: Wilson's (1927) for an accuracy; for
a drop in accuracy between the same questions answered twice it is Agresti and Min's (2005), who add half a question to
each of the four outcomes, since the textbook's standard error is 0 where every question changes sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from toolkit.figures import FIGURES, Figure
from toolkit.report.sections import Check, Report, TaskRow, Verdict

# 95%, one-sided.
_Z: Final = 1.6449


@dataclass(frozen=True)
class Sampled:
    """A share of questions, its standard error where two were asked, and the end of its confidence interval that lies
    towards passing."""

    value: float
    standard_error: float | None
    bound: float


def judge(report: Report, thresholds: Mapping[str, float]) -> Verdict:
    """The verdict. Neither no check nor a check on a figure that was not measured, which has no value, is a pass."""
    checks = tuple(_check(FIGURES[name], threshold, report) for name, threshold in thresholds.items())
    return Verdict(bool(checks) and all(check.passed for check in checks), checks)


def value_of(figure: Figure, report: Report) -> float | None:
    """Returns a figure's value in a report, the worst over the tasks, or None if it was not measured."""
    if figure.sampled:
        worst = _worst(figure, report)
        return worst.value if worst else None
    section = getattr(report, figure.section)
    value: float | None = getattr(section, figure.key or figure.name, None)
    return value


def accuracy_of(row: TaskRow) -> Sampled:
    """A task's accuracy with Wilson's upper bound."""
    _, high = wilson_interval(row.accuracy, row.examples, _Z) or (0.0, 1.0)
    return Sampled(row.accuracy, row.accuracy_se, high)


def accuracy_drop_of(row: TaskRow) -> Sampled | None:
    """What a task lost against the checkpoint, with Agresti and Min's lower bound; None without the checkpoint's
    answers."""
    if row.reference_accuracy is None or row.right_to_wrong is None or row.wrong_to_right is None:
        return None
    net, changed, n = row.right_to_wrong - row.wrong_to_right, row.right_to_wrong + row.wrong_to_right, row.examples + 2
    error = math.sqrt(max(changed + 1 - net**2 / n, 0.0)) / n
    return Sampled(row.reference_accuracy - row.accuracy, row.accuracy_drop_se, net / n - _Z * error)


def wilson_interval(share: float, examples: int, z: float = 1.96) -> tuple[float, float] | None:
    """The interval of a share of `examples` independent trials (Wilson 1927), by default the two-sided 95% one; None
    without examples."""
    if examples <= 0:
        return None
    scale = 1 + z * z / examples
    centre = (share + z * z / (2 * examples)) / scale
    spread = z * math.sqrt(max(share * (1 - share), 0.0) / examples + (z / examples) ** 2 / 4) / scale
    return max(centre - spread, 0.0), min(centre + spread, 1.0)


def _check(figure: Figure, threshold: float, report: Report) -> Check:
    sampled = _worst(figure, report) if figure.sampled else None
    value = sampled.value if sampled else value_of(figure, report)
    held = sampled.bound if sampled else value
    passed = held is not None and (held >= threshold if figure.at_least else held <= threshold)
    error, bound = (sampled.standard_error, sampled.bound) if sampled else (None, None)
    return Check(figure.name, ">=" if figure.at_least else "<=", threshold, passed, value, error, bound)


def _worst(figure: Figure, report: Report) -> Sampled | None:
    """The task that speaks most against the bundle."""
    rows = report.tasks if figure.section == "tasks" else report.simulator.tasks if report.simulator else None
    if figure.at_least:
        return min(map(accuracy_of, rows or ()), key=lambda found: found.bound, default=None)
    drops = _drops(rows or ())
    return max(drops, key=lambda found: found.bound, default=None)


def _drops(rows: Sequence[TaskRow]) -> list[Sampled]:
    return [found for row in rows if (found := accuracy_drop_of(row)) is not None]
