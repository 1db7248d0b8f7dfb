"""The story of a model that a user names and nothing else: which target this machine has for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolkit.checkpoint.download import hub_file, is_hub_id
from toolkit.checkpoint.gguf import is_gguf
from toolkit.checkpoint.opened import Checkpoint, synthetic_checkpoint
from toolkit.checkpoint.remote import open_headers
from toolkit.errors import MachineError, RecipeError
from toolkit.evaluate.providers import provider_is_here
from toolkit.machine import free_memory_bytes
from toolkit.names import CONFIG_FILE
from toolkit.pipeline.catalogue_row import runs_on
from toolkit.pipeline.plan import plan_export, shorten_context
from toolkit.recipe import load_recipe, meant_recipe, model_names, nearest, recipe_names
from toolkit.target import TARGETS, Target

# The most able first: what draws least and leaves the rest of the machine free.
_DEVICES: Final = ("npu", "gpu", "cpu")


@dataclass(frozen=True)
class ChosenTarget:
    """What to plan for a model: a recipe or a bare target, the checkpoint for the latter, and why this target."""

    target: str
    recipe: str
    checkpoint: str | None
    why: str


def choose_target(model: str, target: str | None = None, revision: str | None = None) -> ChosenTarget:
    """Chooses the best target of this machine for a model of the recipes, a hub id or a folder; `target` decides by
    itself. Raises RecipeError for a word that is none of these, MachineError if no target fits the memory."""
    if target is not None:
        if target not in TARGETS:
            raise RecipeError(
                f"no target {target!r}{nearest(target, list(TARGETS))}: those known are {', '.join(TARGETS)}"
            )
        return _chosen(model, TARGETS[target], "asked for", _known(model))
    known, opened = _known(model), None
    refused: list[str] = []
    for row in _here():
        chosen = _chosen(model, row, "", known)
        recipe = load_recipe(chosen.recipe, (), chosen.checkpoint)
        if opened is None:
            facts = recipe.facts()
            opened = synthetic_checkpoint(facts) if facts and not revision else _headers(model, revision)
        if chosen.checkpoint:
            recipe = shorten_context(recipe, opened.config)
        plan = plan_export(recipe, opened, Path("build") / recipe.name, "int4")
        size = sum(plan.files.values())
        _, runs = runs_on(row, size, plan.opened_cache_bytes)
        if runs:
            what = row.accelerator.execution_provider
            return ChosenTarget(
                row.name, chosen.recipe, chosen.checkpoint, f"{what} is the best that is here, and {_gib(size)} fit"
            )
        refused.append(f"{row.name} takes {_gib(size)} and {_gib(plan.opened_cache_bytes)} of cache")
    raise MachineError(
        f"{model} does not fit the {_gib(free_memory_bytes())} of free memory: {'; '.join(refused)}: close programs, "
        "name a smaller model, or make it all the same with --target"
    )


def _here() -> list[Target]:
    """The targets whose execution provider is here, each device's in the order of the table; cpu-split is for proving
    pipelines, and slower than cpu."""
    rows = [
        row
        for row in TARGETS.values()
        if (row.accelerator.provider is None and not row.partitioned)
        or (row.accelerator.provider and provider_is_here(row.accelerator.provider))
    ]
    return sorted(rows, key=lambda row: _DEVICES.index(row.accelerator.device))


def _known(model: str) -> bool:
    """Whether a word is the name of a model of the recipes. Raises RecipeError for one that is nothing at all."""
    models = model_names()
    if model in models:
        return True
    place = Path(model)
    if is_hub_id(model) or hub_file(model) or (place / CONFIG_FILE).is_file() or is_gguf(place):
        return False
    if model in recipe_names():
        raise RecipeError(f"{model} is a recipe, which names its target: `toolkit export {model}`")
    raise RecipeError(
        f"{model!r} is no model{nearest(model, models)}: expected a hub id, a folder with a {CONFIG_FILE}, or one of "
        f"{', '.join(models)}"
    )


def _chosen(model: str, row: Target, why: str, known: bool) -> ChosenTarget:
    if known and f"{model}-{row.name}" in recipe_names():
        return ChosenTarget(row.name, f"{model}-{row.name}", None, why)
    if known:
        of = next(name for name in recipe_names() if any(name == f"{model}-{t}" for t in TARGETS))
        return ChosenTarget(row.name, row.name, load_recipe(of).model, why)
    meant = meant_recipe(row.name, model)
    return ChosenTarget(row.name, meant, None if meant != row.name else model, why)


def _headers(model: str, revision: str | None) -> Checkpoint:
    return open_headers(model, revision)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
