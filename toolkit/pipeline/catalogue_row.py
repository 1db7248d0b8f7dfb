"""A row of the catalogue: a recipe, a bundle or a checkpoint on the hub, and what this machine can do with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from toolkit.evaluate.providers import provider_is_here
from toolkit.machine import free_disk_bytes, free_memory_bytes
from toolkit.pipeline.bandwidth import memory_bandwidth
from toolkit.pipeline.planned_recipe import OUT, Planned
from toolkit.recipe import Recipe
from toolkit.target import TARGETS, Target

RECIPE: Final = "recipe"
BUNDLE: Final = "bundle"
HUB: Final = "hub"
# A run holds the weights about once, packed anew for the kernels, and the whole KV cache.
_HELD: Final = 1.2


@dataclass(frozen=True)
class CatalogueRow:
    """A recipe, a bundle or a hub id for one target: sizes, in words what this machine can do with it (`here`), and
    whether it runs (`runs_here`).

    `predicted_tokens_per_s` is a bound on decoding by this machine's memory bandwidth, for what runs on its CPU. What
    is not known is None: `license`, and the figures of a bundle that was not validated. `path` is a bundle's folder,
    `form` how its graph is written where it was traced.
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
    form: str | None = None


def runs_on(target: Target, size: int, cache: int) -> tuple[str, bool]:
    """Returns in words what a bundle of so many bytes would run on here, and whether it does as it is."""
    if free_memory_bytes() < size * _HELD + cache:
        return "too little memory to run", False
    provider = target.accelerator.provider
    if provider and not provider_is_here(provider):
        return "runs with --on-cpu", False
    return "runs", True


def predicted_speed(target: Target, runs: bool, read_bytes: int) -> float | None:
    """Returns the most tokens/s that this machine's memory allows a bundle whose tokens read so many bytes; None where
    it does not run, or not on the CPU."""
    if not runs or not read_bytes or target.accelerator.provider:
        return None
    return memory_bandwidth().bytes_per_s / read_bytes


def planned_row(kind: str, recipe: Recipe, plan: Planned, license: str | None) -> CatalogueRow:
    """Returns the row of a bundle that is yet to be made."""
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
        predicted_speed(target, runs and enough, plan.read_bytes),
        license,
    )


def _here(words: str) -> str:
    """The words of a bundle that is yet to be made."""
    return {"runs": "exports and runs", "runs with --on-cpu": "exports, and runs with --on-cpu"}.get(
        words, f"exports; {words}"
    )
