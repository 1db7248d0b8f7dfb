"""The install story: bundles read, a host's folder decided, then made; and taken away again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from toolkit.errors import RecipeError
from toolkit.hosts import foundry_local, ort_package, other_hosts
from toolkit.hosts.installable import plain_name, read_installable
from toolkit.hosts.installation import Installation, check_installable, install_planned
from toolkit.hosts.words import AI_TOOLKIT, FOUNDRY_LOCAL, HOSTS, LEMONADE, PACKAGE, WINDOWS_ML_CATALOG


def install_bundles(
    bundles: Sequence[Path],
    to: str,
    name: str | None = None,
    root: Path | None = None,
    base_url: str | None = None,
    license: str | None = None,
    dry_run: bool = False,
) -> list[Installation]:
    """Puts bundles where a host reads them, several into one package; returns what was put where.

    `name` is the model's name there, `root` the host's folder of models, `base_url` where a catalogue's files are
    hosted, `license` what it says of the licence. `dry_run` decides and checks, and writes nothing. Raises RecipeError
    or BundleError before anything is written, UnsupportedError for what a host does not run.
    """
    if to not in HOSTS:
        raise RecipeError(f"no host is called {to!r}: those known are {', '.join(HOSTS)}")
    if not bundles:
        raise RecipeError("no bundle is named: expected the folder of one")
    if (base_url or license) and to != WINDOWS_ML_CATALOG:
        raise RecipeError("--base-url and --license are the catalogue's: leave them out, or --to windows-ml-catalog")
    if name and len(bundles) > 1 and to != PACKAGE:
        raise RecipeError("--name would give several bundles one name: install them one by one")
    read = [read_installable(bundle) for bundle in bundles]
    named = plain_name(name) if name else None
    if to == PACKAGE:
        planned = [ort_package.plan_package(read, named, root)]
    elif to == FOUNDRY_LOCAL:
        planned = [foundry_local.plan_foundry_local(bundle, named, root) for bundle in read]
    elif to == AI_TOOLKIT:
        planned = [other_hosts.plan_ai_toolkit(bundle, named, root) for bundle in read]
    elif to == LEMONADE:
        planned = [other_hosts.plan_lemonade(bundle, named, root) for bundle in read]
    else:
        planned = [other_hosts.plan_windows_ml_catalog(bundle, named, root, base_url, license) for bundle in read]
    _check_apart(planned)
    for installation in planned:
        check_installable(installation)
    for installation in [] if dry_run else planned:
        install_planned(installation)
    return planned


def _check_apart(planned: Sequence[Installation]) -> None:
    """Raises RecipeError for bundles that would go into one folder, of which the last would be left."""
    places = [installation.folder for installation in planned]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise RecipeError(f"two bundles would be {twice}: install them one by one, with another --name")
