"""Commands that make bundles, and one that says what they are made of: export, compile, inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.cli.effort import effort_of, effort_options
from toolkit.cli.judge import validate_bundles
from toolkit.cli.options import ADAPTER, AS_JSON, BUNDLE, CHECKPOINT_HELP, DEVICE, REVISION, WORKERS
from toolkit.cli.printing import print_costs, print_exported, print_note, print_plans
from toolkit.soc import SOCS
from toolkit.typed_json import to_json

if TYPE_CHECKING:
    from toolkit.checkpoint.opened import Checkpoint
    from toolkit.pipeline.described import DescribedPlan
    from toolkit.pipeline.judge import Effort
    from toolkit.pipeline.plan import ExportPlan


@click.command()
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@click.option("--checkpoint", help=CHECKPOINT_HELP)
@REVISION
@ADAPTER
@click.option("--out", type=click.Path(path_type=Path), help="Where the bundle goes, or several [build/RECIPE].")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change the recipe: quantize.0.bits=8.")
@click.option("--precision", type=click.Choice(["int4", "fp32"]), default="int4", help="fp32 keeps every weight.")
@click.option("--quality", type=click.Choice(["fast", "balanced", "best"]), help="What to do for the weights [recipe].")
@click.option("--calibration", type=click.Path(path_type=Path), help="Text to calibrate on [the recipe's].")
@click.option("--draft", metavar="PLACE", help="A smaller model that guesses tokens ahead; made beside the bundle.")
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing, download no weights.")
@click.option("--synthetic", is_flag=True, help="Random weights of the recipe's true shapes; nothing is downloaded.")
@click.option("--no-validate", is_flag=True, help="Skip the comparison with the checkpoint.")
@click.option("--no-compile", is_flag=True, help="Leave qnn's compiling out; `toolkit compile` does it.")
@click.option("--force", is_flag=True, help="Make it anew though it is there, validated or not.")
@click.option("--trace", is_flag=True, help="A decoder of any family, traced by torch, for the CPU.")
@DEVICE
@WORKERS
@AS_JSON
@effort_options
def export(
    recipes: tuple[str, ...],
    checkpoint: str | None,
    revision: str | None,
    adapter: Path | None,
    out: Path | None,
    changes: tuple[str, ...],
    precision: str,
    quality: str | None,
    calibration: Path | None,
    draft: str | None,
    dry_run: bool,
    synthetic: bool,
    no_validate: bool,
    no_compile: bool,
    force: bool,
    trace: bool,
    device: str,
    workers: str | None,
    as_json: bool,
    **effort: Any,
) -> None:
    """Convert one RECIPE to one bundle: a name, a path, or a bare target such as cpu with --checkpoint; a known
    model's hub id is its recipe for the CPU.

    Several recipes of one model are made in one pass over its checkpoint, and share what is equal on the disk.
    """
    from toolkit import library
    from toolkit.device.chosen import chosen_device
    from toolkit.pipeline.described import described_with_costs
    from toolkit.pipeline.draft import with_drafts
    from toolkit.progress import progress_line

    plans = library.plan(
        *recipes,
        checkpoint=checkpoint,
        out=out,
        changes=changes,
        quality=quality,
        calibration=calibration,
        precision=precision,
        synthetic=synthetic,
        shapes_alone=dry_run,
        revision=revision,
        adapter=adapter,
        draft=draft,
        trace=trace,
        note=print_note,
    )
    made, compiles, wanted = with_drafts(plans), not no_compile, None if no_validate or synthetic else effort_of(effort)
    described = described_with_costs(made, wanted, compiles, chosen_device(device))
    if dry_run:
        _print_dry_run(made, described, as_json)
        return
    print_costs(described)
    with progress_line() as progress:
        bundles = library.export(
            plans, compile=compiles, force=force, device=device, workers=workers, progress=progress, note=print_note
        )
    _print_made(bundles, plans[0].opened, wanted, as_json, device, workers)


def _print_made(
    bundles: list[Path], checkpoint: Checkpoint, wanted: Effort | None, as_json: bool, device: str, workers: str | None
) -> None:
    """Bundles that were made, each beside its checkpoint where that is wanted."""
    if wanted is None:
        print_exported(bundles, as_json)
        return
    for bundle in bundles:
        click.echo(f"bundle: {bundle}", err=as_json)
    validate_bundles(bundles, checkpoint, wanted, as_json, device, workers, anew=False)


def _print_dry_run(plans: list[ExportPlan], described: list[DescribedPlan], as_json: bool) -> None:
    """What stands in the way is the last line after a plan, and the document in place of one."""
    from toolkit.pipeline.export import check_exports

    if as_json:
        check_exports(plans)
    print_plans(described, as_json)
    check_exports(plans)


@click.command(name="compile")
@BUNDLE
@click.option("--soc", type=click.Choice(list(SOCS)), help="For another SoC than the bundle's recipe names.")
@AS_JSON
def compile_(bundle: Path, soc: str | None, as_json: bool) -> None:
    """The transformer of BUNDLE to EPContext files for its SoC, part by part; goes on where it was stopped."""
    from toolkit import library
    from toolkit.progress import progress_line

    with progress_line() as progress:
        rows = library.compile(bundle, soc, progress=progress)
    if as_json:
        click.echo(json.dumps(to_json(rows), indent=2, ensure_ascii=False))
        return
    for row in rows:
        if row.compiled:
            size = f"{row.bin}, {(row.bin_bytes or 0) / 2**20:.1f} MiB"
            click.echo(f"{row.file}: {row.nodes} nodes in EPContext, {size}")


@click.command()
@click.argument("path")
@REVISION
@AS_JSON
def inspect(path: str, revision: str | None, as_json: bool) -> None:
    """What a checkpoint, a folder or a hub id, or a bundle is, from headers alone."""
    from toolkit import library

    facts = library.inspect(path, revision=revision).as_json()
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for key, value in facts.items():
        if isinstance(value, list):
            click.echo(f"{key}:")
            for row in value:
                click.echo("  " + "  ".join(str(v) for v in row.values()))
        else:
            click.echo(f"{key}: {value}")
