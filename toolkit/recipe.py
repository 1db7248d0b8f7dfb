"""A YAML recipe, read into a frozen `Recipe`; unknown keys are refused with the nearest known one."""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from toolkit.errors import RecipeError

_HERE = Path(__file__).resolve().parent
_ROOTS = (_HERE / "data", _HERE.parent)


@dataclass(frozen=True)
class QuantRule:
    """`match` is one or more globs over checkpoint module names, separated by `|`."""

    match: str
    algorithm: str = "rtn"
    bits: int = 4
    block_size: int = 32
    symmetric: bool = False

    def matches(self, module: str) -> bool:
        """Whether this rule decides `module`, such as `model.layers.0.mlp.down_proj`."""
        return any(fnmatch.fnmatchcase(module, glob.strip()) for glob in self.match.split("|"))


@dataclass(frozen=True)
class Recipe:
    """One model for one target. Rules are tried in order, the first match wins."""

    name: str
    model: str
    target: str
    context_length: int
    quantize: tuple[QuantRule, ...]
    validate: dict[str, float]

    def rule_for(self, module: str) -> QuantRule:
        """The rule that decides a module; raises RecipeError if none matches."""
        for rule in self.quantize:
            if rule.matches(module):
                return rule
        raise RecipeError(f"recipe {self.name} has no quantize rule for {module}: end the list with match: '*'")


def data_folder(kind: str) -> Path:
    """`recipes` or `models`: inside an installed package, or beside it in a checkout."""
    return next((root / kind for root in _ROOTS if (root / kind).is_dir()), _ROOTS[0] / kind)


def recipe_names() -> list[str]:
    """Every recipe in the tree."""
    return sorted(path.stem for path in data_folder("recipes").glob("*.yaml"))


def load_recipe(name_or_path: str) -> Recipe:
    """A recipe by path or by name. Raises RecipeError with what to write instead."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = data_folder("recipes") / f"{name_or_path}.yaml"
        if not path.is_file():
            known = recipe_names()
            hint = _nearest(name_or_path, known)
            raise RecipeError(f"no recipe {name_or_path!r}{hint}: known are {', '.join(known)}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise RecipeError(f"recipe {path} cannot be read: {str(problem).splitlines()[0]}") from None
    _check_keys(raw, Recipe, str(path))
    rules = raw["quantize"]
    if not isinstance(rules, list) or not rules:
        raise RecipeError(f"{path}: quantize must be a list of rules")
    recipe = Recipe(**{**raw, "quantize": tuple(_rule(rule, str(path)) for rule in rules)})
    if recipe.target != "cpu":
        raise RecipeError(f"{path}: target {recipe.target!r} is not supported yet, expected 'cpu'")
    if not isinstance(recipe.context_length, int) or recipe.context_length < 1:
        raise RecipeError(f"{path}: context_length is {recipe.context_length!r}, expected a token count")
    return recipe


def _rule(raw: Any, where: str) -> QuantRule:
    _check_keys(raw, QuantRule, where, required=("match",))
    rule = QuantRule(**raw)
    if rule.algorithm != "rtn":
        raise RecipeError(f"{where}: algorithm {rule.algorithm!r} is unknown, expected rtn")
    if rule.bits not in (4, 8) or rule.block_size not in (16, 32, 64, 128, 256):
        raise RecipeError(f"{where}: {rule.bits} bits in blocks of {rule.block_size}: expected 4 or 8 bits, 16 to 256")
    return rule


def _check_keys(raw: Any, kind: type, where: str, required: tuple[str, ...] | None = None) -> None:
    if not isinstance(raw, dict):
        raise RecipeError(f"{where} holds a {type(raw).__name__}, expected keys and values")
    known = [field.name for field in fields(kind)]
    for key in raw:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{_nearest(str(key), known)}")
    for key in known if required is None else required:
        if key not in raw:
            raise RecipeError(f"{where}: key {key!r} is missing")


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
