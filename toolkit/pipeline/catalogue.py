"""The catalogue: recipes in the tree, bundles on this machine and checkpoints on the hub, in one kind of row."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from toolkit.errors import RecipeError
from toolkit.pipeline.catalogue_row import RECIPE, CatalogueRow, planned_row
from toolkit.pipeline.planned_recipe import planned_recipes
from toolkit.recipe import Recipe, known_license, load_recipe, recipe_names
from toolkit.target import TARGETS


@dataclass(frozen=True)
class Search:
    """What a search of the catalogue wants. `words` all stand somewhere in a row's names or licence, in any case;
    `model`, `target` and `license` are globs. Bundles are looked for in `folders`, and `hub_ids` are asked on the hub,
    for `target` or else the CPU."""

    words: tuple[str, ...] = ()
    model: str | None = None
    target: str | None = None
    license: str | None = None
    max_bytes: int | None = None
    min_context: int | None = None
    runs_here: bool = False
    folders: tuple[Path, ...] = field(default_factory=tuple)
    hub_ids: tuple[str, ...] = ()


def search_catalogue(wanted: Search) -> list[CatalogueRow]:
    """Returns the rows that a search wants: recipes by name, bundles by folder, hub ids as given.

    Raises RecipeError if there is none, CheckpointError for a hub id that cannot be looked at.
    """
    loaded = [load_recipe(name) for name in recipe_names()]
    rows = [
        planned_row(RECIPE, recipe, plan, known_license(recipe.name, recipe.target))
        for recipe, plan in planned_recipes(recipe for recipe in loaded if _may_be(wanted, recipe))
    ]
    rows += [*_bundle_rows(wanted), *_hub_rows(wanted)]
    found = [row for row in rows if _fits(wanted, row)]
    if not found:
        models = dict.fromkeys(recipe.name.removesuffix(f"-{recipe.target}") for recipe in loaded)
        raise RecipeError(f"no recipe is of that: models are {', '.join(models)}, targets {', '.join(TARGETS)}")
    return found


def _may_be(wanted: Search, recipe: Recipe) -> bool:
    """Whether a recipe is worth a plan: what its name already decides."""
    return _is_of(recipe.name, recipe.model, recipe.target, wanted.model) and _matches(recipe.target, wanted.target)


def _is_of(name: str, model: str, target: str, glob: str | None) -> bool:
    return _matches(name.removesuffix(f"-{target}"), glob) or _matches(model, glob)


def _matches(word: str, glob: str | None) -> bool:
    return glob is None or fnmatchcase(word.lower(), glob.lower())


def _fits(wanted: Search, row: CatalogueRow) -> bool:
    said = " ".join([row.kind, row.recipe, row.model, row.target, row.license or ""]).lower()
    return (
        all(word.lower() in said for word in wanted.words)
        and _is_of(row.recipe, row.model, row.target, wanted.model)
        and _matches(row.target, wanted.target)
        and _matches(row.license or "", wanted.license)
        and (wanted.max_bytes is None or row.bundle_bytes <= wanted.max_bytes)
        and (wanted.min_context is None or row.context_length >= wanted.min_context)
        and (row.runs_here or not wanted.runs_here)
    )


def _bundle_rows(wanted: Search) -> list[CatalogueRow]:
    if not wanted.folders:
        return []
    # As below: who looks at recipes alone does not wait for what else there is to be imported.
    from toolkit.pipeline.catalogue_bundles import bundle_folders, bundle_row

    return [row for folder in bundle_folders(wanted.folders) if (row := bundle_row(folder))]


def _hub_rows(wanted: Search) -> list[CatalogueRow]:
    if not wanted.hub_ids:
        return []
    from toolkit.pipeline.catalogue_hub import hub_row

    targets = [name for name in TARGETS if _matches(name, wanted.target)] if wanted.target else ["cpu"]
    return [hub_row(hub_id, target) for hub_id in wanted.hub_ids for target in targets]
