"""The cells of a matrix before they are made: what each will cost, and what decides it, as one hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit import library
from toolkit.bundle.manifest import begin_manifest
from toolkit.checkpoint.download import is_hub_id
from toolkit.device.chosen import chosen_device
from toolkit.errors import ToolkitError
from toolkit.files import file_sha256
from toolkit.pipeline.described import DescribedPlan, described_with_costs
from toolkit.pipeline.judge import Effort
from toolkit.pipeline.judge.subject import task_file
from toolkit.pipeline.plan import ExportPlan
from toolkit.pipeline.text import find_text
from toolkit.recipe import Matrix, MatrixCell, load_recipe
from toolkit.typed_json import to_json


@dataclass(frozen=True)
class PlannedCell:
    """A cell with its export's plan and forecast, or the `refusal` of what cannot be planned; `out` is its bundle."""

    cell: MatrixCell
    out: Path
    plan: ExportPlan | None = None
    described: DescribedPlan | None = None
    refusal: str | None = None

    @property
    def seconds(self) -> float:
        """The forecast of its time here."""
        phases = self.described.forecast if self.described else None
        return sum(phase.forecast_s for phase in phases or ())


def plan_cells(matrix: Matrix, out: Path, exact: bool) -> list[PlannedCell]:
    """Each cell's plan, of which no weights are downloaded; a cell that will not do has its refusal, others go on.

    With `exact` the files of a hub id's checkpoint are looked up, so that its commit is known; without it the shapes
    that come with the toolkit do.
    """
    planned = [_planned(cell, out / cell.name, exact) for cell in matrix.cells]
    found = [entry.plan for entry in planned if entry.plan]
    described = iter(described_with_costs(found, effort_of(matrix), True, chosen_device(matrix.device)))
    return [replace(entry, described=next(described)) if entry.plan else entry for entry in planned]


def _planned(cell: MatrixCell, out: Path, exact: bool) -> PlannedCell:
    try:
        place = cell.checkpoint
        if exact and place is None:
            place = load_recipe(cell.recipe, cell.changes).model
        (plan,) = library.plan(
            cell.recipe,
            checkpoint=place,
            out=out,
            changes=cell.changes,
            quality=cell.quality,
            shapes_alone=True,
            revision=cell.revision,
        )
    except ToolkitError as problem:
        return PlannedCell(cell, out, refusal=" ".join(str(problem).split()))
    return PlannedCell(cell, out, plan)


def effort_of(matrix: Matrix) -> Effort | None:
    """How much of each bundle is validated; None for nothing."""
    if matrix.validate is None:
        return None
    counts = {key: value for key, value in matrix.validate.items() if not isinstance(value, bool)}
    switches = {key: value for key, value in matrix.validate.items() if isinstance(value, bool)}
    return Effort(
        tokens=counts.get("tokens"),
        examples=counts.get("examples"),
        max_new_tokens=counts.get("max_new_tokens", Effort.max_new_tokens),
        tasks=switches.get("tasks", True),
        speed=switches.get("speed", True),
        baseline=switches.get("baseline"),
        simulate=switches.get("simulate"),
    )


def export_words(matrix: Matrix, planned: PlannedCell, force: bool) -> list[str]:
    """The words of the command that makes a cell, after `toolkit`."""
    cell = planned.cell
    given = {"--checkpoint": cell.checkpoint, "--revision": cell.revision, "--quality": cell.quality}
    words = ["export", cell.recipe]
    for option, value in given.items():
        words += [option, value] if value else []
    for change in cell.changes:
        words += ["--set", change]
    words += ["--out", str(planned.out), *(["--device", matrix.device] if matrix.device != "cpu" else [])]
    words += ["--workers", matrix.workers] if matrix.workers else []
    words += ["--force"] if force else []
    return [*words, *_effort_words(matrix)]


def _effort_words(matrix: Matrix) -> list[str]:
    if matrix.validate is None:
        return ["--no-validate"]
    words = []
    for key, value in matrix.validate.items():
        option = key.replace("_", "-")
        if value is False:
            words.append(f"--no-{option}")
        elif value is True:
            # What is measured unless it is left out has no option that asks for it.
            words += [f"--{option}"] if key in ("baseline", "simulate") else []
        else:
            words += [f"--{option}", str(value)]
    return words


def input_hash(matrix: Matrix, planned: PlannedCell, digests: Callable[[ExportPlan], object]) -> str:
    """SHA-256 of all that decides a cell's bundle and report: the resolved recipe, the versions of packages, the files
    of the checkpoint, the texts, how much is validated and on what it is computed.

    `digests` gives what a checkpoint's files hold.
    """
    plan = planned.plan
    if plan is None:
        return ""
    begun = begin_manifest(plan.recipe, plan.precision, plan.opened, plan.stop_tokens, None)
    texts = [find_text(plan.recipe.calibration, plan.recipe.name, plan.recipe.target, plan.opened)]
    texts += [task_file(name, plan.recipe, plan.opened) for name in plan.recipe.tasks]
    parts = {
        "manifest": to_json(replace(begun, checkpoint=())),
        "checkpoint": digests(plan),
        "texts": [file_sha256(path) if path.is_file() else str(path) for path in texts],
        "validate": dict(matrix.validate) if matrix.validate is not None else None,
        "device": matrix.device,
        # Not how many: bytes do not depend on it.
        **({"workers": True} if matrix.workers else {}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()


def hub_commit(planned: PlannedCell) -> str | None:
    """The commit of a cell's checkpoint where that is a hub id's: its files are kept under that name."""
    place = planned.cell.checkpoint or (planned.plan.recipe.model if planned.plan else "")
    if planned.plan is None or Path(place).exists() or not is_hub_id(place):
        return None
    return planned.plan.opened.folder.name


def total_seconds(planned: Sequence[PlannedCell]) -> float:
    """The forecast of all cells together, one after another."""
    return sum(entry.seconds for entry in planned)
