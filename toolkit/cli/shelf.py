"""Commands about what there is: recipes, get, doctor."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolkit.cli.options import AS_JSON, DEVICE, REVISION
from toolkit.cli.printing import one_document, print_exported, print_note
from toolkit.target import TARGETS
from toolkit.typed_json import to_json

if TYPE_CHECKING:
    from toolkit.pipeline.catalogue_row import CatalogueRow
    from toolkit.pipeline.doctor import BundleState, Diagnosis


@click.command()
@click.argument("words", nargs=-1, metavar="[WORD]...")
@click.option("--model", help="Those of one model: its name or hub id, or a glob of either, such as '*qwen*'.")
@click.option("--target", help="Those for one target, or a glob of targets, such as 'cpu*'.")
@click.option("--license", help="Those under one licence, in the hub's words, or a glob of licences.")
@click.option("--max-gib", type=click.FloatRange(min=0), help="Bundles of at most so many GiB.")
@click.option("--min-context", type=click.IntRange(min=1), help="Bundles of at least so many tokens of context.")
@click.option("--runs-here", is_flag=True, help="What this machine runs as it is.")
@click.option("--bundles", multiple=True, type=click.Path(path_type=Path), help="Bundles at and below a folder too.")
@click.option("--hub", "hub_ids", multiple=True, metavar="HUB_ID", help="A checkpoint on the hub too, by its headers.")
@AS_JSON
def recipes(
    words: tuple[str, ...],
    model: str | None,
    target: str | None,
    license: str | None,
    max_gib: float | None,
    min_context: int | None,
    runs_here: bool,
    bundles: tuple[Path, ...],
    hub_ids: tuple[str, ...],
    as_json: bool,
) -> None:
    """The recipes that come with the toolkit, bundles here and checkpoints on the hub: what has every WORD in its names
    or licence, and what this machine can do with it.

    Tokens a second are at most what the memory of this machine allows, measured once, or what a bundle's report has.
    """
    from toolkit import library

    rows = library.recipes(
        *words,
        model=model,
        target=target,
        license=license,
        max_bytes=None if max_gib is None else int(max_gib * 2**30),
        min_context=min_context,
        runs_here=runs_here,
        bundles=bundles,
        hub_ids=hub_ids,
    )
    if as_json:
        click.echo(json.dumps(to_json(rows), indent=2, ensure_ascii=False))
        return
    width = max(len(row.recipe) for row in rows)
    head = f"{'recipe':{width}} {'target':9} {'bundle':>9} {'bits':>5} {'context':>8} {'tokens/s':>9}"
    click.echo(f"{head} {'KLD':>6} {'licence':10}  {'here':35} model")
    for row in rows:
        click.echo(_row(row, width))


def _row(row: CatalogueRow, width: int) -> str:
    mebibytes = row.bundle_bytes / 2**20
    size = f"{mebibytes / 1024:.2f} GiB" if mebibytes >= 1024 else f"{mebibytes:.1f} MiB"
    measured, bound = row.decode_tokens_per_s, row.predicted_tokens_per_s
    speed = f"{measured:.1f}" if measured else f"< {bound:.3g}" if bound else "-"
    kld = f"{row.mean_kld:.3f}" if row.mean_kld is not None else "-"
    where = f"{row.path or row.model}{f' ({row.form})' if row.form else ''}"
    return (
        f"{row.recipe:{width}} {row.target:9} {size:>9} {row.bits_per_weight:5.2f} {row.context_length:8} "
        f"{speed:>9} {kld:>6} {row.license or '-':10}  {row.here:35} {where}"
    )


@click.command()
@click.argument("model")
@click.option("--target", type=click.Choice(list(TARGETS)), help="For this target [the best that is here].")
@click.option("--out", type=click.Path(path_type=Path), help="Where the bundle goes [build/RECIPE].")
@click.option("--quality", type=click.Choice(["fast", "balanced", "best"]), help="What to do for the weights [recipe].")
@REVISION
@DEVICE
@AS_JSON
def get(
    model: str,
    target: str | None,
    out: Path | None,
    quality: str | None,
    revision: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Download MODEL and convert it for the best target of this machine: a model of `toolkit recipes` such as 1.5b, a
    hub id, or a folder."""
    from toolkit import library
    from toolkit.progress import progress_line

    with progress_line() as progress:
        bundle = library.get(
            model,
            target=target,
            out=out,
            quality=quality,
            revision=revision,
            device=device,
            progress=progress,
            note=print_note,
        )
    print_exported([bundle], as_json)
    click.echo(f"talk to it: toolkit chat {bundle}", err=as_json)


@click.command()
@click.argument("folders", nargs=-1, metavar="[FOLDER]...", type=click.Path(path_type=Path))
@click.option("--fix", is_flag=True, help="Compile binaries that no longer fit, from the graphs beside them.")
@AS_JSON
def doctor(folders: tuple[Path, ...], fix: bool, as_json: bool) -> None:
    """What this machine has to run bundles with, and what those in FOLDER, build/ if none is named, would run on, lack,
    and are mended by."""
    from toolkit import library
    from toolkit.progress import progress_line

    with progress_line() as progress:
        found = library.doctor(*folders, fix=fix, progress=progress)
    if as_json:
        click.echo(one_document([found]))
    else:
        _print_machine(found)
        for bundle in found.bundles:
            _print_bundle(bundle)
    if not found.passed:
        sys.exit(1)


def _print_machine(found: Diagnosis) -> None:
    machine = found.machine
    click.echo(f"{machine.cpu}, {machine.cores} cores, {machine.os}, Python {machine.python}")
    click.echo(
        f"memory: {machine.ram_bytes / 2**30:.1f} GiB, {found.memory_free_bytes / 2**30:.1f} free, "
        f"{found.memory_bytes_per_s / 1e9:.1f} GB/s; disk: {found.disk_free_bytes / 2**30:.1f} GiB free"
    )
    click.echo(", ".join(f"{name.replace('_', '-')} {version}" for name, version in machine.versions.items()))
    for row in found.providers:
        version = f", installed in version {row.version}" if row.version else ""
        install = f": it comes with {row.install}" if row.install and not row.version else ""
        state = "is here" if row.here else f"is not here with its device{version}{install}"
        click.echo(f"{row.execution_provider} ({row.device}) {state}")


def _print_bundle(bundle: BundleState) -> None:
    click.echo(f"{bundle.path}: {bundle.recipe or 'unreadable'}, runs on {bundle.runs_on}")
    for change in bundle.changed:
        click.echo(f"  since it was made: {change}")
    for problem in bundle.mended:
        click.echo(f"  mended: {problem}")
    if bundle.not_mended:
        click.echo(f"  not mended: {bundle.not_mended}")
    for ailment in bundle.ailments:
        click.echo(f"  FAIL: {ailment.problem}")
        click.echo(f"  mend: {ailment.command}")
