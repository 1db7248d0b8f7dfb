"""Checkpoints on the hub, each a row of the catalogue."""

from __future__ import annotations

from toolkit.checkpoint.download import hub_license
from toolkit.checkpoint.remote import open_headers
from toolkit.pipeline.catalogue_row import HUB, CatalogueRow, planned_row
from toolkit.pipeline.plan import plan_export, shorten_context
from toolkit.pipeline.planned_recipe import OUT, planned
from toolkit.recipe import load_recipe


def hub_row(hub_id: str, target: str) -> CatalogueRow:
    """Returns what a bundle of a hub id would be, from its config and the headers of its weights."""
    opened = open_headers(hub_id)
    recipe = shorten_context(load_recipe(target, (), hub_id), opened.config)
    plan = plan_export(recipe, opened, OUT / recipe.name, "int4")
    return planned_row(HUB, recipe, planned(plan), hub_license(hub_id))
