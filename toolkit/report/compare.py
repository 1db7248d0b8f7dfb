"""Two reports side by side, and what became worse by more than it may: a row a figure, a line a regression.

A later report that lacks a figure of the earlier has lost it, which is a regression too. What the machine decides
(speed, seconds, memory) is judged between equal machines alone. Of shares of questions two samples are compared: the
later is worse where the 95% confidence interval, one-sided, of the difference lies beyond the tolerance; the interval
is that of Agresti and Caffo (2000), who add a question of each outcome to both samples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from toolkit.errors import RecipeError
from toolkit.figures import FIGURES, Figure
from toolkit.report.formatting import format_figure
from toolkit.report.sections import Report, TaskRow
from toolkit.report.verdict import value_of

# 95%, one-sided.
_Z: Final = 1.6449
# A divergence that grows by less is the last bits of float32, whatever share of the earlier one it is.
_LEAST_NATS: Final = 1e-5
# What a tolerance is called that allows everything.
ANY: Final = "any"
_AMOUNT: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(%?)")


@dataclass(frozen=True)
class ComparedFigure:
    """One figure of two reports, None where one has not measured it. `tolerance` is None where it is not judged;
    `regression` says in a line by how much it became worse than that."""

    name: str
    a: float | None
    b: float | None
    tolerance: str | None
    regression: str | None = None


@dataclass(frozen=True)
class ComparedReports:
    """Two reports' figures; `notes` say what makes some of them hard to compare."""

    passed: bool
    figures: tuple[ComparedFigure, ...]
    notes: tuple[str, ...]

    @property
    def regressions(self) -> list[str]:
        """What became worse by more than it may, a line each."""
        return [row.regression for row in self.figures if row.regression]


def compare_reports(a: Report, b: Report, tolerances: Mapping[str, str] | None = None) -> ComparedReports:
    """Every figure that one of two reports has, the earlier `a` and the later `b`.

    `tolerances` has for names of figures how much worse each may be, `0.005`, `5%` of the earlier, or `any`, in place
    of what toolkit/figures.py says. Raises RecipeError for a figure that does not exist and for no such amount.
    """
    asked = dict(tolerances or {})
    for name, amount in asked.items():
        if name not in FIGURES:
            raise RecipeError(f"there is no figure {name!r} to tolerate, expected one of {', '.join(FIGURES)}")
        if amount != ANY and not _AMOUNT.fullmatch(amount):
            raise RecipeError(f"the tolerance of {name} is {amount!r}, expected an amount (0.005), a share (5%) or any")
    alike = (a.machine.cpu, a.machine.cores) == (b.machine.cpu, b.machine.cores)
    rows: list[ComparedFigure] = []
    for figure in FIGURES.values():
        judged = figure.name in asked or alike or not figure.here
        tolerance = asked.get(figure.name, figure.tolerance) if judged else ""
        tolerance = "" if tolerance == ANY else tolerance
        rows += _task_rows(figure, a, b, tolerance) if figure.sampled else _row(figure, a, b, tolerance)
    return ComparedReports(not any(row.regression for row in rows), tuple(rows), tuple(_notes(a, b, alike)))


def _row(figure: Figure, a: Report, b: Report, tolerance: str) -> list[ComparedFigure]:
    """The figure's row; none where neither report has it."""
    before, after = value_of(figure, a), value_of(figure, b)
    if before is None and after is None:
        return []
    worse = None
    if tolerance and before is not None:
        worse = _lost(figure.name) if after is None else _worse(figure, figure.name, before, after, tolerance)
    return [ComparedFigure(figure.name, before, after, tolerance or None, worse)]


def _worse(figure: Figure, name: str, before: float, after: float, tolerance: str) -> str | None:
    """The line of a regression; None where there is none."""
    by = before - after if figure.at_least else after - before
    allowed = _allowed(before, tolerance)
    if figure.form == "kld":
        allowed = max(allowed, _LEAST_NATS)
    # As many last bits as a subtraction may lose.
    if by <= allowed + 1e-12 * abs(before):
        return None
    return _line(figure, name, before, after, tolerance)


def _allowed(before: float, tolerance: str) -> float:
    amount = float(tolerance.removesuffix("%"))
    return abs(before) * amount / 100 if tolerance.endswith("%") else amount


def _line(figure: Figure, name: str, before: float, after: float, tolerance: str, beside: str = "") -> str:
    shown = [format_figure(figure.name, value) for value in (before, after)]
    return f"{name} went from {shown[0]} to {shown[1]}{beside}, which is worse by more than {tolerance}"


def _lost(name: str) -> str:
    return f"{name} was measured in the first and is not in the second"


def _task_rows(figure: Figure, a: Report, b: Report, tolerance: str) -> Iterator[ComparedFigure]:
    """A row a task, called `TASK.figure`; a drop against the checkpoint is shown and not judged twice."""
    before, after = ({row.name: row for row in _tasks(figure, report)} for report in (a, b))
    for task in dict.fromkeys([*before, *after]):
        name, sides = f"{task}.{figure.name}", (before.get(task), after.get(task))
        values = [None if row is None else _value(figure, row) for row in sides]
        worse = None
        if tolerance and values[0] is not None:
            first, second = sides
            if first is None or second is None or values[1] is None:
                worse = _lost(name)
            elif _sample_is_worse(first, second, _allowed(values[0], tolerance)):
                asked = f" on {first.examples} and {second.examples} questions"
                worse = _line(figure, name, values[0], values[1], tolerance, asked)
        if values != [None, None]:
            yield ComparedFigure(name, values[0], values[1], tolerance or None, worse)


def _tasks(figure: Figure, report: Report) -> tuple[TaskRow, ...]:
    if figure.section == "tasks":
        return report.tasks or ()
    return (report.simulator.tasks or ()) if report.simulator else ()


def _value(figure: Figure, row: TaskRow) -> float | None:
    if figure.at_least:
        return row.accuracy
    return None if row.reference_accuracy is None else row.reference_accuracy - row.accuracy


def _sample_is_worse(before: TaskRow, after: TaskRow, allowed: float) -> bool:
    """Whether two samples of questions show an accuracy that fell by more than is allowed."""
    sizes = [row.examples + 2 for row in (before, after)]
    shares = [(row.accuracy * row.examples + 1) / size for row, size in zip((before, after), sizes, strict=True)]
    error = math.sqrt(sum(share * (1 - share) / size for share, size in zip(shares, sizes, strict=True)))
    return shares[0] - shares[1] - _Z * error > allowed


def _notes(a: Report, b: Report, alike: bool) -> Iterator[str]:
    """What a reader has to know before the figures."""
    for what, before, after in (
        ("the model", a.model, b.model),
        ("the target", a.target, b.target),
        ("random weights", a.synthetic, b.synthetic),
        ("tokens compared", a.parity and a.parity.tokens, b.parity and b.parity.tokens),
        ("tokens of the prompt", a.speed and a.speed.prompt_tokens, b.speed and b.speed.prompt_tokens),
    ):
        if before is not None and after is not None and before != after:
            yield f"{what} differ: {before} and {after}"
    if not alike:
        yield (
            f"the machines differ, {a.machine.cpu} of {a.machine.cores} cores and {b.machine.cpu} of "
            f"{b.machine.cores}: speed, seconds and memory are shown, not judged"
        )
