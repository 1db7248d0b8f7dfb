"""The story of a matrix: plan, hold the folder, make what is not made yet, sum up after each cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.errors import BundleError, RecipeError
from toolkit.files import check_writable, disk_errors, write_text
from toolkit.matrix.cells import DONE, run_cell
from toolkit.matrix.planned import PlannedCell, export_words, hub_commit, input_hash, plan_cells
from toolkit.matrix.state import MadeCell, MatrixState
from toolkit.pipeline.place import held
from toolkit.progress import counted
from toolkit.recipe import Matrix
from toolkit.report.cells import CellOutcome, junit_xml, matrix_page
from toolkit.report.sections import Report
from toolkit.report.summary import load_report

PAGE_FILE: Final = "index.html"
JUNIT_FILE: Final = "junit.xml"


@dataclass(frozen=True)
class MatrixResult:
    """Where a matrix's bundles are, and what became of its cells; `passed` if all of them are as asked for."""

    folder: Path
    passed: bool
    cells: tuple[CellOutcome, ...]


def run_matrix(
    matrix: Matrix,
    out: Path,
    force: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
) -> MatrixResult:
    """Makes each cell's bundle at `out/CELL`, in a process of its own, unless it stands there of equal inputs.

    A summary page and JUnit XML are written as it begins and after each cell, so that whatever stops it leaves them
    right. Raises MachineError if another process makes a matrix there.
    """
    if (out / names.MANIFEST_FILE).is_file():
        raise RecipeError(f"{out} is a bundle, and a matrix makes bundles in it: name another --out")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        check_writable(out)
        with held([out]):
            return _run(matrix, out, force, counted(progress, "matrix", len(matrix.cells)), note)


def _run(
    matrix: Matrix, out: Path, force: bool, progress: Callable[[str], None], note: Callable[[str], None]
) -> MatrixResult:
    state = MatrixState(out)
    planned = plan_cells(matrix, out, exact=True)
    outcomes = {entry.cell.name: CellOutcome(entry.cell.name, "not run", 0.0, 0) for entry in planned}
    _sum_up(matrix, out, list(outcomes.values()))
    for entry in planned:
        outcome = _made(matrix, entry, state, force)
        outcomes[entry.cell.name] = outcome
        _sum_up(matrix, out, list(outcomes.values()))
        progress(f"{entry.cell.name} {outcome.state}{', kept' if outcome.kept else ''}")
        if outcome.error:
            note(f"{entry.cell.name}: {outcome.error}")
    cells = tuple(outcomes.values())
    return MatrixResult(out, all(cell.fine for cell in cells), cells)


def _made(matrix: Matrix, planned: PlannedCell, state: MatrixState, force: bool) -> CellOutcome:
    """One cell, made or found as it was made."""
    cell = planned.cell
    if planned.refusal:
        return CellOutcome(cell.name, "broken", 0.0, 0, error=planned.refusal)
    commit = hub_commit(planned)
    wanted = input_hash(matrix, planned, lambda plan: commit or state.digests(plan))
    before = state.made(cell.name)
    if not force and before and before.input_hash == wanted and before.exit_code in DONE and _stands(planned.out):
        return replace(_outcome(cell.name, planned.out, before), kept=True)
    # What stands here was made by an earlier run of the matrix, of other inputs: that is known, and it is replaced.
    replaces = force or bool(before and before.input_hash != wanted)
    words = export_words(matrix, planned, replaces)
    ended = run_cell(words, planned.out.with_name(f"{cell.name}.log"), matrix.retries, matrix.timeout_s)
    if ended.exit_code in DONE:
        made = MadeCell(cell.name, wanted, ended.exit_code, ended.seconds, ended.attempts)
        state.record(made)
        return _outcome(cell.name, planned.out, made)
    return CellOutcome(cell.name, "broken", ended.seconds, ended.attempts, error=ended.error)


def _stands(bundle: Path) -> bool:
    """Whether a finished bundle with a report is there."""
    return all((bundle / name).is_file() for name in (names.MANIFEST_FILE, names.REPORT_FILE))


def _outcome(name: str, bundle: Path, made: MadeCell) -> CellOutcome:
    """What became of a cell whose command did its work."""
    try:
        report: Report = load_report(bundle)
    except BundleError as problem:
        return CellOutcome(name, "broken", made.seconds, made.attempts, error=str(problem))
    state = "made" if report.verdict is None else "passed" if report.verdict.passed else "failed"
    return CellOutcome(name, state, made.seconds, made.attempts, report=report)


def _sum_up(matrix: Matrix, out: Path, cells: Sequence[CellOutcome]) -> None:
    write_text(out / PAGE_FILE, matrix_page(matrix.name, cells))
    write_text(out / JUNIT_FILE, junit_xml(matrix.name, cells))
