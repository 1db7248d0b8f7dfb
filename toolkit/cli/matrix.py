"""The command that makes many bundles from one file: matrix."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolkit.cli.options import AS_JSON, WORKERS
from toolkit.cli.printing import print_note, rough_time
from toolkit.typed_json import to_json

if TYPE_CHECKING:
    from toolkit.matrix.planned import PlannedCell
    from toolkit.recipe import Matrix


@click.command()
@click.argument("file", metavar="MATRIX.yaml", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Where the bundles go [build/NAME].")
@click.option("--dry-run", is_flag=True, help="Print each cell's cost and command; write nothing.")
@click.option("--force", is_flag=True, help="Make every cell anew though it is there.")
@WORKERS
@AS_JSON
def matrix(file: Path, out: Path | None, dry_run: bool, force: bool, workers: str | None, as_json: bool) -> None:
    """Make the bundle of each cell of MATRIX.yaml, models x targets x qualities, in a process of its own.

    What stands there of equal inputs is kept. index.html and junit.xml in the folder sum up all reports; exit code 1
    unless every cell passes.
    """
    from toolkit.matrix.planned import plan_cells
    from toolkit.matrix.story import run_matrix
    from toolkit.progress import progress_line
    from toolkit.recipe import read_matrix

    found = read_matrix(file)
    found = replace(found, workers=workers or found.workers)
    folder = out or Path("build") / found.name
    if dry_run:
        _print_plans(found, plan_cells(found, folder, exact=False), as_json)
        return
    with progress_line() as progress:
        result = run_matrix(found, folder, force, progress, print_note)
    if as_json:
        # Each bundle has its own report.
        cells = [to_json(replace(cell, report=None)) for cell in result.cells]
        document = {"folder": str(folder), "passed": result.passed, "cells": cells}
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        for cell in result.cells:
            click.echo(f"{cell.state}: {cell.name}" + (", kept" if cell.kept else f", {cell.seconds:.0f} s"))
        click.echo(f"summary: {folder / 'index.html'}")
    if not result.passed:
        sys.exit(1)


def _print_plans(found: Matrix, planned: list[PlannedCell], as_json: bool) -> None:
    """A line a cell with what it will take, and the command that makes it."""
    from toolkit.matrix.planned import export_words, total_seconds

    rows = [(entry, shlex.join(["toolkit", *export_words(found, entry, False)])) for entry in planned]
    if as_json:
        document = [
            {
                "cell": entry.cell.name,
                "command": command,
                "forecast_s": entry.seconds,
                "refusal": entry.refusal,
                "plan": to_json(entry.described),
            }
            for entry, command in rows
        ]
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    for entry, command in rows:
        if plan := entry.described:
            disk = f"{plan.disk_needed_bytes / 2**20:.0f} MiB of disk"
            memory = max((phase.memory_bytes or 0 for phase in plan.forecast or ()), default=0) / 2**20
            click.echo(f"{entry.cell.name}: about {rough_time(entry.seconds)}, {memory:.0f} MiB of memory, {disk}")
        else:
            click.echo(f"{entry.cell.name}: refused, {entry.refusal}")
        click.echo(f"  {command}")
    click.echo(f"{len(planned)} cells, about {rough_time(total_seconds(planned))} one after another")
