"""The command that holds one bundle's report against another's: compare."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolkit.cli.options import AS_JSON
from toolkit.cli.printing import print_note
from toolkit.typed_json import to_json

if TYPE_CHECKING:
    from toolkit.report.compare import ComparedReports


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--tolerance",
    "tolerances",
    multiple=True,
    metavar="FIGURE=AMOUNT",
    help="How much worse a figure of B may be: mean_kld=5%, top1_agreement=0.005, ttft_s=any.",
)
@AS_JSON
def compare(a: Path, b: Path, tolerances: tuple[str, ...], as_json: bool) -> None:
    """The reports of two bundles, or two report.json, side by side; exit code 1 if B is worse than A by more than it
    may be, a line each."""
    from toolkit import library

    for words in tolerances:
        if "=" not in words:
            raise click.UsageError(f"--tolerance is {words!r}, expected FIGURE=AMOUNT such as mean_kld=5%")
    found = library.compare(a, b, tolerances=dict(_parted(words) for words in tolerances))
    if as_json:
        click.echo(json.dumps(to_json(found), indent=2, ensure_ascii=False))
    else:
        _print_comparison(found)
    if not found.passed:
        sys.exit(1)


def _parted(words: str) -> tuple[str, str]:
    name, _, amount = words.partition("=")
    return name.strip(), amount.strip()


def _print_comparison(found: ComparedReports) -> None:
    """A table of figures, then what became worse."""
    from toolkit.report.formatting import format_figure

    for note in found.notes:
        print_note(note)
    rows = [("figure", "A", "B", "tolerance")]
    for row in found.figures:
        form = row.name.rpartition(".")[2]
        shown = ["not measured" if value is None else format_figure(form, value) for value in (row.a, row.b)]
        rows.append((row.name, shown[0], shown[1], row.tolerance or "not judged"))
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    for cells in rows:
        name, a, b, tolerance = cells
        click.echo(f"{name:{widths[0]}}  {a:>{widths[1]}}  {b:>{widths[2]}}  {tolerance}")
    for line in found.regressions:
        click.echo(f"REGRESSION: {line}")
    if found.passed:
        click.echo("nothing is worse than it may be")
