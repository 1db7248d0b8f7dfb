"""The recipes in the tree, sized, and what this machine can do with each."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from toolkit.checkpoint.opened import synthetic_checkpoint
from toolkit.errors import RecipeError
from toolkit.evaluate.session import provider_is_here
from toolkit.machine import free_memory_bytes
from toolkit.pipeline.plan import ExportPlan, plan_export
from toolkit.recipe import Recipe, load_recipe, recipe_names
from toolkit.target import TARGETS


@dataclass(frozen=True)
class RecipeRow:
    """A recipe of the tree, the size of its bundle, and in words what this machine can do with it (`here`)."""

    recipe: str
    model: str
    target: str
    context_length: int
    bundle_bytes: int
    bits_per_weight: float
    here: str


def recipe_rows(model: str | None = None, target: str | None = None) -> list[RecipeRow]:
    """Returns one row a recipe, by its name.

    `model` (a name such as `14b`, or a hub id) and `target` keep those that they match, as globs and in any case.
    Raises RecipeError if there is none.
    """
    loaded = [load_recipe(name) for name in recipe_names()]
    chosen = [recipe for recipe in loaded if _is_of(recipe, model) and _matches(recipe.target, target)]
    if not chosen:
        models = dict.fromkeys(recipe.name.removesuffix(f"-{recipe.target}") for recipe in loaded)
        raise RecipeError(f"no recipe is of that: models are {', '.join(models)}, targets {', '.join(TARGETS)}")
    return [_row(recipe, facts) for recipe in chosen if (facts := recipe.facts())]


def _is_of(recipe: Recipe, model: str | None) -> bool:
    return _matches(recipe.name.removesuffix(f"-{recipe.target}"), model) or _matches(recipe.model, model)


def _matches(word: str, glob: str | None) -> bool:
    return glob is None or fnmatchcase(word.lower(), glob.lower())


def _row(recipe: Recipe, facts: Path) -> RecipeRow:
    plan = plan_export(recipe, synthetic_checkpoint(facts), Path("build") / recipe.name, "int4")
    return RecipeRow(
        recipe=recipe.name,
        model=recipe.model,
        target=recipe.target,
        context_length=recipe.context_length,
        bundle_bytes=sum(plan.files.values()),
        bits_per_weight=plan.bits_per_weight,
        here=_here(plan),
    )


def _here(plan: ExportPlan) -> str:
    """Whether disk allows the export and memory a run; the export itself needs little memory."""
    if plan.disk_free_bytes < plan.disk_needed_bytes:
        return "too little disk to export"
    # A run holds the weights about once, packed anew for the kernels, and the whole KV cache.
    if free_memory_bytes() < sum(plan.files.values()) * 1.2 + plan.kv_cache_bytes:
        return "exports; too little memory to run"
    provider = plan.target.accelerator.provider
    if provider and not provider_is_here(provider):
        return "exports, and runs with --on-cpu"
    return "exports and runs"
