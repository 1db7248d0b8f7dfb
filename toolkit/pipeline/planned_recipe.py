"""What the bundles of the toolkit's own recipes weigh, written down beside them: planning all takes seconds, and who
looks at the catalogue waits for a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from toolkit.errors import RecipeError
from toolkit.files import read_json, write_text
from toolkit.names import CONFIG_FILE
from toolkit.recipe import Recipe, data_folder, load_recipe, recipe_names
from toolkit.recipe.tree import find_recipe
from toolkit.typed_json import from_json, to_json

if TYPE_CHECKING:
    from toolkit.pipeline.plan import ExportPlan

# Where an export goes that is told nothing else.
OUT: Final = Path("build")
PLANNED_FILE: Final = "planned.json"
_MAX_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Planned:
    """What of a plan does not depend on what is free on this machine; `read_bytes` are the weights that a token
    reads."""

    bundle_bytes: int
    bits_per_weight: float
    cache_bytes: int
    read_bytes: int
    disk_needed_bytes: int


@dataclass(frozen=True)
class _Row:
    """A recipe's plan, and the hash of the recipe's and the config's text that it was made of."""

    made_of: str
    planned: Planned


@dataclass(frozen=True)
class _WrittenDown:
    """Rows by recipe."""

    recipes: dict[str, _Row]


def planned(plan: ExportPlan) -> Planned:
    """What a plan says on any machine."""
    from toolkit.report.weights import weight_bytes_per_token

    return Planned(
        sum(plan.files.values()),
        plan.bits_per_weight,
        plan.opened_cache_bytes,
        weight_bytes_per_token(plan.layout),
        plan.disk_needed_bytes,
    )


def planned_recipes(recipes: Iterable[Recipe]) -> list[tuple[Recipe, Planned]]:
    """Each of the toolkit's own recipes that has its model's facts here, with its plan, which is made where none is
    written down of this very recipe and config."""
    written = _written_down()
    found = []
    for recipe in recipes:
        if facts := recipe.facts():
            row = written.get(recipe.name)
            is_current = row is not None and row.made_of == _made_of(recipe.name, facts)
            found.append((recipe, row.planned if row and is_current else plan_recipe(recipe.name)))
    return found


@cache
def plan_recipe(name: str) -> Planned:
    """Plans one of the toolkit's own recipes."""
    # What plans imports what reads, quantizes and writes: longer than the whole look takes without.
    from toolkit.checkpoint.opened import synthetic_checkpoint
    from toolkit.pipeline.plan import plan_export

    recipe = load_recipe(name)
    facts = recipe.facts()
    if facts is None:
        raise RecipeError(f"recipe {name} has no config under models/")
    return planned(plan_export(recipe, synthetic_checkpoint(facts), OUT / name, "int4"))


def write_down() -> None:
    """Plans every recipe and writes the file anew, a line a recipe: `python docs/planned_recipes.py`."""
    lines = []
    for name in recipe_names():
        if facts := load_recipe(name).facts():
            row = json.dumps(to_json(_Row(_made_of(name, facts), plan_recipe(name))))
            lines.append(f"    {json.dumps(name)}: {row}")
    write_text(data_folder("recipes") / PLANNED_FILE, '{\n  "recipes": {\n' + ",\n".join(lines) + "\n  }\n}\n")


@cache
def _written_down() -> dict[str, _Row]:
    """The rows of the file; none where it is not here or not as it was written, and all is planned."""
    with suppress(RecipeError, ValueError):
        path = data_folder("recipes") / PLANNED_FILE
        raw = read_json(path, _MAX_BYTES, RecipeError, "its recipes are planned anew")
        return from_json(_WrittenDown, raw, str(path)).recipes
    return {}


def _made_of(name: str, facts: Path) -> str:
    """A hash of a recipe's text and its model's config, whatever ends their lines."""
    texts = (path.read_text(encoding="utf-8") for path in (find_recipe(name), facts / CONFIG_FILE))
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]
