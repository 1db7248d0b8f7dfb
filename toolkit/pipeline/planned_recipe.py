"""What the bundles of recipes weigh, planned once and kept: planning all takes seconds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Final

from toolkit.checkpoint.opened import synthetic_checkpoint
from toolkit.files import read_state, write_state
from toolkit.machine import cache_folder
from toolkit.pipeline.plan import ExportPlan, plan_export
from toolkit.recipe import Recipe, data_folder
from toolkit.report.weights import weight_bytes_per_token

# Where an export goes that is told nothing else.
OUT: Final = Path("build")
_FILE: Final = "planned_recipes.json"
_PACKAGE: Final = Path(__file__).resolve().parent.parent


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
class _Kept:
    """Plans by recipe, and the hash of what they were made of."""

    made_of: str
    planned: dict[str, Planned]


def planned(plan: ExportPlan) -> Planned:
    """What a plan says on any machine."""
    return Planned(
        sum(plan.files.values()),
        plan.bits_per_weight,
        plan.opened_cache_bytes,
        weight_bytes_per_token(plan.layout),
        plan.disk_needed_bytes,
    )


def planned_recipes(recipes: Iterable[Recipe]) -> list[tuple[Recipe, Planned]]:
    """Each of the toolkit's own recipes that has its model's facts here, with its plan, which is made where none is
    kept in the cache folder by this very code, recipe and config."""
    path, made_of = cache_folder() / _FILE, _made_of()
    kept = read_state(_Kept, path)
    known = kept.planned if kept and kept.made_of == made_of else {}
    found = [
        (recipe, known.get(recipe.name) or _planned(recipe, facts)) for recipe in recipes if (facts := recipe.facts())
    ]
    if any(recipe.name not in known for recipe, _ in found):
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_state(path, _Kept(made_of, known | {recipe.name: row for recipe, row in found}))
    return found


# For who looks again where no cache folder can be written.
@lru_cache(maxsize=256)
def _planned(recipe: Recipe, facts: Path) -> Planned:
    return planned(plan_export(recipe, synthetic_checkpoint(facts), OUT / recipe.name, "int4"))


@cache
def _made_of() -> str:
    """The hash of the toolkit's code, its recipes, and the configs of their models."""
    files = [*_PACKAGE.rglob("*.py"), *data_folder("recipes").glob("*.yaml"), *data_folder("models").glob("*/*.json")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.name} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
