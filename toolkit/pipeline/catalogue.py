"""The recipes in the tree, sized, and what this machine can do with each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.checkpoint.opened import synthetic_checkpoint
from toolkit.evaluate.session import provider_is_here
from toolkit.machine import free_memory_bytes
from toolkit.pipeline.plan import ExportPlan, plan_export
from toolkit.recipe import load_recipe, recipe_names


def recipe_rows() -> list[dict[str, Any]]:
    """One row a recipe: model, target, context_length, bundle_bytes, bits_per_weight, and `here`."""
    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        facts = recipe.facts()
        if facts is None:
            continue
        plan = plan_export(recipe, synthetic_checkpoint(facts), Path("build") / name, "int4")
        rows.append(
            {
                "recipe": name,
                "model": recipe.model,
                "target": recipe.target,
                "context_length": recipe.context_length,
                "bundle_bytes": sum(plan.files.values()),
                "bits_per_weight": plan.bits_per_weight,
                "here": _here(plan),
            }
        )
    return rows


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
