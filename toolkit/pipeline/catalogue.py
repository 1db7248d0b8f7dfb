"""The catalogue: recipes in the tree, bundles on this machine and checkpoints on the hub, in one kind of row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.bundle.cache import cache_bytes
from toolkit.bundle.manifest import read_manifest
from toolkit.bundle.settings import read_settings
from toolkit.checkpoint.download import hub_license
from toolkit.checkpoint.remote import open_headers
from toolkit.errors import BundleError, RecipeError
from toolkit.evaluate.session import provider_is_here
from toolkit.machine import free_memory_bytes
from toolkit.pipeline.bandwidth import memory_bandwidth
from toolkit.pipeline.plan import free_disk_bytes, plan_export, shorten_context
from toolkit.pipeline.planned_recipe import OUT, Planned, planned, planned_recipes
from toolkit.recipe import Recipe, known_license, load_recipe, recipe_names
from toolkit.report.sections import Quantization, Report
from toolkit.report.summary import load_report
from toolkit.target import TARGETS, Target

RECIPE: Final = "recipe"
BUNDLE: Final = "bundle"
HUB: Final = "hub"
# A run holds the weights about once, packed anew for the kernels, and the whole KV cache.
_HELD: Final = 1.2
# Bundles lie in a folder of bundles: deeper there are other people's trees.
_DEPTH: Final = 2


@dataclass(frozen=True)
class CatalogueRow:
    """A recipe, a bundle or a hub id for one target: sizes, in words what this machine can do with it (`here`), and
    whether it runs (`runs_here`).

    `predicted_tokens_per_s` is a bound on decoding by this machine's memory bandwidth, for what runs on its CPU. What
    is not known is None: `license`, and the figures of a bundle that was not validated. `path` is a bundle's folder.
    """

    kind: str
    recipe: str
    model: str
    target: str
    context_length: int
    bundle_bytes: int
    bits_per_weight: float
    here: str
    runs_here: bool
    predicted_tokens_per_s: float | None = None
    license: str | None = None
    mean_kld: float | None = None
    top1_agreement: float | None = None
    accuracy: float | None = None
    decode_tokens_per_s: float | None = None
    path: str | None = None


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
        _planned_row(RECIPE, recipe, plan, known_license(recipe.name, recipe.target))
        for recipe, plan in planned_recipes(recipe for recipe in loaded if _may_be(wanted, recipe))
    ]
    rows += [row for folder in bundle_folders(wanted.folders) if (row := bundle_row(folder))]
    rows += [_hub_row(hub_id, target) for hub_id in wanted.hub_ids for target in _hub_targets(wanted)]
    found = [row for row in rows if _fits(wanted, row)]
    if not found:
        models = dict.fromkeys(recipe.name.removesuffix(f"-{recipe.target}") for recipe in loaded)
        raise RecipeError(f"no recipe is of that: models are {', '.join(models)}, targets {', '.join(TARGETS)}")
    return found


def bundle_folders(places: Sequence[Path]) -> Iterator[Path]:
    """Yields the folders with a manifest of ours, at and below each place, sorted; none where a place is not there."""
    for place in places:
        for path, folders, files in os.walk(place):
            if names.MANIFEST_FILE in files and names.GENAI_CONFIG_FILE in files:
                yield Path(path)
                folders.clear()
            elif len(Path(path).relative_to(place).parts) >= _DEPTH:
                folders.clear()
            folders[:] = sorted(name for name in folders if not name.startswith(".") and not name.endswith(".partial"))


def bundle_row(bundle: Path) -> CatalogueRow | None:
    """Returns a bundle's row; None for one that cannot be read, of which `doctor` says why."""
    try:
        manifest, settings = read_manifest(bundle), read_settings(bundle)
        cache = cache_bytes(bundle, settings, settings.max_length)
    except BundleError:
        return None
    report, target = _report(bundle), TARGETS[manifest.recipe.target]
    size = sum(entry.bytes for entry in manifest.files)
    here, runs = runs_on(target, size, cache)
    weights = report.quantization if report else None
    tasks = report.tasks if report else None
    return CatalogueRow(
        BUNDLE,
        manifest.recipe.name,
        manifest.recipe.model,
        target.name,
        settings.context_length,
        size,
        weights.bits_per_weight if weights else 0.0,
        here,
        runs,
        _predicted(target, runs, _read_bytes(weights)),
        known_license(manifest.recipe.name, target.name),
        report.parity.mean_kld if report and report.parity else None,
        report.parity.top1_agreement if report and report.parity else None,
        tasks[0].accuracy if tasks else None,
        report.speed.decode_tokens_per_s if report and report.speed else None,
        str(bundle),
    )


def runs_on(target: Target, size: int, cache: int) -> tuple[str, bool]:
    """Returns in words what a bundle of so many bytes would run on here, and whether it does as it is."""
    if free_memory_bytes() < size * _HELD + cache:
        return "too little memory to run", False
    provider = target.accelerator.provider
    if provider and not provider_is_here(provider):
        return "runs with --on-cpu", False
    return "runs", True


def _report(bundle: Path) -> Report | None:
    try:
        return load_report(bundle)
    except BundleError:
        return None


def _read_bytes(weights: Quantization | None) -> int:
    """The bytes of weights that a token reads: all matrices but an embedding that is not the LM head too."""
    rows = weights.by_role if weights else ()
    untied = any(row.role == "lm_head" for row in rows)
    return sum(row.bytes for row in rows if not (untied and row.role == "embed_tokens"))


def _predicted(target: Target, runs: bool, read_bytes: int) -> float | None:
    if not runs or not read_bytes or target.accelerator.provider:
        return None
    return memory_bandwidth().bytes_per_s / read_bytes


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


def _hub_targets(wanted: Search) -> list[str]:
    return [name for name in TARGETS if _matches(name, wanted.target)] if wanted.target else ["cpu"]


def _hub_row(hub_id: str, target: str) -> CatalogueRow:
    """What a bundle of a hub id would be, from its config and the headers of its weights."""
    opened = open_headers(hub_id)
    recipe = shorten_context(load_recipe(target, (), hub_id), opened.config)
    plan = plan_export(recipe, opened, OUT / recipe.name, "int4")
    return _planned_row(HUB, recipe, planned(plan), hub_license(hub_id))


def _planned_row(kind: str, recipe: Recipe, plan: Planned, license: str | None) -> CatalogueRow:
    target = TARGETS[recipe.target]
    words, runs = runs_on(target, plan.bundle_bytes, plan.cache_bytes)
    enough = free_disk_bytes(OUT / recipe.name) >= plan.disk_needed_bytes
    return CatalogueRow(
        kind,
        recipe.name,
        recipe.model,
        recipe.target,
        recipe.context_length,
        plan.bundle_bytes,
        plan.bits_per_weight,
        _here(words) if enough else "too little disk to export",
        runs and enough,
        _predicted(target, runs and enough, plan.read_bytes),
        license,
    )


def _here(words: str) -> str:
    """The words of a bundle that is yet to be made."""
    return {"runs": "exports and runs", "runs with --on-cpu": "exports, and runs with --on-cpu"}.get(
        words, f"exports; {words}"
    )
