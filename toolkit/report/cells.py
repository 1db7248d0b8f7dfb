"""What became of the cells of a matrix, on one page and as JUnit XML, which CI servers read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree

from toolkit.figures import FIGURES
from toolkit.report.formatting import format_figure, format_number, format_seconds, label_of
from toolkit.report.page import template
from toolkit.report.sections import Check, Report
from toolkit.report.verdict import value_of

_TEMPLATE: Final = "matrix.html.jinja"
# What XML 1.0 cannot hold.
_NO_XML: Final = re.compile(r"[^\t\n\r\u0020-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")
# The columns of figures, as far as any cell has them.
_SHOWN: Final = (
    "bits_per_weight",
    "weight_bytes",
    "mean_kld",
    "top1_agreement",
    "perplexity",
    "accuracy",
    "decode_tokens_per_s",
    "conversion_s",
)


@dataclass(frozen=True)
class CellOutcome:
    """One cell: `state` is passed, failed (a verdict), made (nothing was judged), broken (`error` says why) or not run;
    `kept` where nothing had to be done. `seconds` are those of the run that did it."""

    name: str
    state: str
    seconds: float
    attempts: int
    kept: bool = False
    error: str | None = None
    report: Report | None = None

    @property
    def fine(self) -> bool:
        """Whether the cell is as it was asked for."""
        return self.state in ("passed", "made")


def matrix_page(name: str, cells: Sequence[CellOutcome]) -> str:
    """The summary of all cells as HTML text, a row a cell, which links to the cell's own report."""
    columns = [figure for figure in _SHOWN if any(_value(figure, cell) is not None for cell in cells)]
    rows = [(cell, [_shown(figure, cell) for figure in columns]) for cell in cells]
    fine = sum(cell.fine for cell in cells)
    page: str = template(_TEMPLATE).render(
        name=name,
        rows=rows,
        columns=[label_of(figure) for figure in columns],
        state="pass" if fine == len(cells) else "fail",
        fine=fine,
        kept=sum(cell.kept for cell in cells),
        spent=format_seconds(sum(cell.seconds for cell in cells if not cell.kept)),
    )
    return page.encode("utf-8", errors="replace").decode("utf-8")


def junit_xml(name: str, cells: Sequence[CellOutcome]) -> str:
    """JUnit XML: a suite a cell, whose first case is the export and each other one a check of its verdict."""
    top = ElementTree.Element("testsuites", name=_clean(name))
    for cell in cells:
        checks = cell.report.verdict.checks if cell.report and cell.report.verdict else ()
        suite = ElementTree.SubElement(
            top,
            "testsuite",
            name=_clean(cell.name),
            tests=str(1 + len(checks)),
            failures=str(sum(not check.passed for check in checks)),
            errors=str(int(cell.state == "broken")),
            skipped=str(int(cell.state == "not run")),
            time=f"{cell.seconds:.3f}",
        )
        case = ElementTree.SubElement(
            suite, "testcase", classname=_clean(cell.name), name="export", time=f"{cell.seconds:.3f}"
        )
        if cell.state == "broken":
            ElementTree.SubElement(case, "error", message=_clean(cell.error or "no reason is known"))
        if cell.state == "not run":
            ElementTree.SubElement(case, "skipped", message="the matrix was stopped before")
        for check in checks:
            case = ElementTree.SubElement(suite, "testcase", classname=_clean(cell.name), name=check.name)
            if not check.passed:
                ElementTree.SubElement(case, "failure", message=_said(check))
    ElementTree.indent(top)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(top, encoding="unicode") + "\n"


def _said(check: Check) -> str:
    value = "was not measured" if check.value is None else format_figure(check.name, check.value)
    return f"{value}, expected {check.relation} {format_figure(check.name, check.threshold)}"


def _clean(text: str) -> str:
    return _NO_XML.sub("?", text)


def _value(figure: str, cell: CellOutcome) -> float | None:
    return value_of(FIGURES[figure], cell.report) if cell.report else None


def _shown(figure: str, cell: CellOutcome) -> str:
    value = _value(figure, cell)
    if value is None:
        return "–"
    return format_number(value) if figure == "bits_per_weight" else format_figure(figure, value)
