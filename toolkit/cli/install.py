"""Commands that put bundles where other programs read them, and take them away again: install, uninstall."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolkit.cli.options import AS_JSON
from toolkit.cli.printing import print_note
from toolkit.hosts.words import HOSTS
from toolkit.typed_json import to_json

if TYPE_CHECKING:
    from toolkit.hosts.installation import DescribedInstallation


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(HOSTS), help="The program, or package for an .ortpackage.")
@click.option("--name", help="The model's name there, without the execution provider [the recipe's].")
@click.option("--root", type=click.Path(path_type=Path), help="Its folder of models [the usual one].")
@click.option("--base-url", help="Where the files of a windows-ml-catalog are hosted [the bundle's folder].")
@click.option("--license", help="The licence that a windows-ml-catalog names [other].")
@click.option("--dry-run", is_flag=True, help="Say what would be put where; write nothing.")
@AS_JSON
def install(
    bundles: tuple[Path, ...],
    to: str,
    name: str | None,
    root: Path | None,
    base_url: str | None,
    license: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Put BUNDLE where another program reads it; large files are linked, not copied.

    Several bundles of one model go into one package.
    """
    from toolkit import library

    made = library.install(*bundles, to=to, name=name, root=root, base_url=base_url, license=license, dry_run=dry_run)
    for note in dict.fromkeys(note for installation in made for note in installation.notes):
        print_note(note)
    if as_json:
        click.echo(json.dumps(to_json(made), indent=2, ensure_ascii=False))
        return
    for installation in made:
        _print_installation(installation, dry_run)


def _print_installation(made: DescribedInstallation, dry_run: bool) -> None:
    """The folder, its files on a dry run, and what is left to the user."""
    click.echo(f"{'would make' if dry_run else 'made'} {made.folder}")
    if dry_run:
        for name in made.of_the_bundle:
            click.echo(f"  {name}: the bundle's")
        for name in made.written:
            click.echo(f"  {name}: written")
    for line in made.then:
        click.echo(f"then: {line}")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@AS_JSON
def uninstall(folder: Path, as_json: bool) -> None:
    """Remove what install put into FOLDER, and nothing else."""
    from toolkit import library

    left = library.uninstall(folder)
    if as_json:
        click.echo(json.dumps({"removed": str(folder), "left": left}, indent=2, ensure_ascii=False))
        return
    click.echo(f"removed what `toolkit install` put into {folder}")
    for name in left:
        click.echo(f"left: {name}, which is not of this toolkit")
