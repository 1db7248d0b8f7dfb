"""From a name, a path or a bare target to a `Recipe`: YAML, a target's defaults, `--set`, checks."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import yaml

from toolkit.errors import RecipeError
from toolkit.files import is_unicode, read_text
from toolkit.recipe.check import check_recipe, check_rule, check_target, check_tasks
from toolkit.recipe.recipe import QuantRule, Recipe
from toolkit.recipe.tree import find_recipe, meant_recipe
from toolkit.recipe.words import is_path, nearest
from toolkit.target import TARGETS
from toolkit.typed_json import JsonObject

# What has no default: a recipe is one model for one target.
REQUIRED_KEYS: Final = ("name", "model", "target")
_MAX_BYTES: Final = 1 << 20


def load_recipe(name_or_path: str, changes: Sequence[str] = (), checkpoint: str | None = None) -> Recipe:
    """Returns a recipe by path, by name, by a known model's hub id, or a bare target's defaults for `checkpoint`, with
    `changes` made to it.

    A change is `key=value`, the key a path of dots (`quantize.0.bits=8`), the value YAML. Relative paths in a file are
    relative to it, those in changes to the current folder. Raises RecipeError with what to write instead.
    """
    word = meant_recipe(name_or_path, checkpoint)
    if word in TARGETS:
        raw: JsonObject = {**_of_target(word, checkpoint)}
        where = f"target {word}"
    else:
        path = find_recipe(word)
        raw, where = read_yaml(path), f"recipe {path}"
        _anchor(raw, path.parent)
    # What is not said follows from these.
    deciding = [change for change in changes if change.startswith(("target=", "quality="))]
    for change in deciding:
        _apply(raw, change)
    raw = _filled(raw)
    for change in changes:
        if change not in deciding:
            _apply(raw, change)
    return parse_recipe(raw, where)


def parse_recipe(raw: JsonObject, where: str) -> Recipe:
    """Returns the recipe that a YAML or JSON object spells, with its target's own values where it has none; `where`
    begins messages.

    Raises RecipeError for unknown keys and for values that cannot be.
    """
    _check_keys(raw, Recipe, REQUIRED_KEYS, where)
    check_target(raw["target"], where)
    raw = _filled(raw)
    rules = raw["quantize"]
    if not isinstance(rules, list | tuple) or not rules:
        raise RecipeError(f"{where}: quantize must be a list of rules")
    read = tuple(_rule(rule, f"{where}, quantize rule {k + 1}") for k, rule in enumerate(rules))
    check_tasks(tasks := raw.get("tasks", []), where)
    recipe = Recipe(**{**raw, "quantize": read, "tasks": tuple(tasks)})
    check_recipe(recipe, where)
    return recipe


def _filled(raw: JsonObject) -> JsonObject:
    """The one place where a recipe gets what it does not say from its target."""
    target = raw.get("target")
    if not isinstance(target, str) or target not in TARGETS:
        return raw
    return {**TARGETS[target].defaults(raw.get("quality")), **raw}


def read_yaml(path: Path, kind: str = "recipe") -> JsonObject:
    """The keys and values of a YAML file of bounded size, without anchors; `kind` begins the message of the RecipeError
    for what is none."""
    try:
        raw = _parsed(read_text(path, _MAX_BYTES, RecipeError))
    except ValueError as problem:
        raise RecipeError(f"{kind} {path} cannot be read: {' '.join(str(problem).split())[:200]}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{kind} {path} holds a {type(raw).__name__}, expected keys and values")
    return raw


class _PlainLoader(yaml.SafeLoader):
    """YAML without anchors, which nine levels deep are gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses an alias where one comes."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases are not read: write the value out")
        return super().compose_node(parent, index)


def _parsed(text: str) -> Any:
    """What YAML means. Raises ValueError for what is none, or for a value such as `!!int x` that cannot be."""
    try:
        value = yaml.load(text, _PlainLoader)
        if "\\" in text and not is_unicode(value):
            raise ValueError("half of a surrogate pair is no text")
        return value
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as problem:
        raise ValueError(str(problem) or type(problem).__name__) from None


def _anchor(raw: JsonObject, folder: Path) -> None:
    """Makes relative paths of a recipe's file relative to its folder: a calibration text, a model that is one."""
    calibration, model = raw.get("calibration"), raw.get("model")
    if isinstance(calibration, str) and is_path(calibration):
        raw["calibration"] = str((folder / calibration).resolve())
    if isinstance(model, str) and model:
        place = (folder / model).resolve()
        if place.exists():
            raw["model"] = str(place)
        elif model.startswith(("./", "../", ".\\", "..\\")):
            raise RecipeError(f"the recipe's model {model} would be {place}, which does not exist")


def _of_target(target: str, checkpoint: str | None) -> dict[str, str]:
    if not checkpoint:
        raise RecipeError(f"{target!r} is a bare target: name what to convert with --checkpoint FOLDER_OR_HUB_ID")
    place = Path(checkpoint)
    stem = place.resolve().name if place.exists() else re.split("[/:]", checkpoint.rstrip("/"))[-1]
    stem = stem.removesuffix(".gguf")
    return {"name": f"{stem}-{target}", "model": checkpoint, "target": target}


def _apply(raw: JsonObject, change: str) -> None:
    """Sets one value in place; a number in the path indexes a list, and one past its end appends."""
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {change}: expected key=value, such as context_length=8192 or quantize.0.bits=8")
    try:
        value = _parsed(text)
    except ValueError as problem:
        reason = " ".join(str(problem).split())[:120]
        raise RecipeError(f"--set {change[:120]}: the value is not YAML of a recipe: {reason}") from None
    holder: Any = raw
    *path, last = key.split(".")
    try:
        for part in path:
            holder = holder[int(part)] if isinstance(holder, list) else holder[part]
        if isinstance(holder, list):
            holder[int(last) : int(last) + 1] = [value]
        else:
            holder[last] = value
    except (KeyError, IndexError, ValueError, TypeError):
        raise RecipeError(f"--set {change}: the recipe has no {key!r}") from None


def _rule(raw: Any, where: str) -> QuantRule:
    if not isinstance(raw, dict):
        raise RecipeError(f"{where} is a {type(raw).__name__}, expected keys and values")
    _check_keys(raw, QuantRule, ("match",), where)
    rule = QuantRule(**raw)
    check_rule(rule, where)
    return rule


def _check_keys(raw: Collection[str], kind: type[Any], required: Sequence[str], where: str) -> None:
    known = [field.name for field in fields(kind)]
    for key in raw:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{nearest(str(key), known)}")
    for key in required:
        if key not in raw:
            raise RecipeError(f"{where}: key {key!r} is missing")
