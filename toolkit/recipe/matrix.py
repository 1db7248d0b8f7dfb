"""A matrix file: models, targets and qualities whose combinations are cells, each one export with its settings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from toolkit.errors import RecipeError
from toolkit.quality import QUALITIES
from toolkit.recipe.read import read_yaml
from toolkit.recipe.tree import meant_recipe, recipe_names
from toolkit.recipe.words import is_path, nearest
from toolkit.target import TARGETS

# What may be said of a bundle's validation, as `toolkit validate` calls it: a count, or whether it is done at all.
_COUNTS: Final = ("tokens", "examples", "max_new_tokens")
_SWITCHES: Final = ("tasks", "speed", "baseline", "simulate")
_MODEL_KEYS: Final = ("name", "checkpoint", "revision")
_SETTING_KEYS: Final = ("match", "set")


@dataclass(frozen=True)
class MatrixCell:
    """One export: `recipe` is a name, a path or a bare target for `checkpoint`; `quality` None leaves it to the recipe;
    `changes` are as for `--set`."""

    name: str
    recipe: str
    checkpoint: str | None = None
    revision: str | None = None
    quality: str | None = None
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Matrix:
    """The cells of a matrix file, and what holds for all of them: how much of each bundle is validated, None for
    nothing, and how often a cell that failed for the machine's sake is tried again."""

    name: str
    cells: tuple[MatrixCell, ...]
    validate: Mapping[str, int | bool] | None
    retries: int
    timeout_s: float | None
    device: str
    workers: str | None = None


def read_matrix(path: Path) -> Matrix:
    """The matrix of a YAML file; paths in it are relative to it. Raises RecipeError for what is none."""
    raw, where = read_yaml(path, "matrix"), f"matrix {path}"
    known = ("name", "models", "targets", "qualities", "recipes", "set", "settings", "leave_out", "validate")
    _check_keys(raw, (*known, "retries", "timeout_s", "device", "workers"), where)
    cells = [*_products(raw, path.parent, where), *_single(raw, path.parent, where)]
    left_out = _texts(raw, "leave_out", where)
    kept = [cell for cell in cells if not any(fnmatchcase(cell.name, glob) for glob in left_out)]
    kept = [_with_settings(cell, raw, where) for cell in kept]
    names = [cell.name for cell in kept]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"{where}: two cells are called {twice[0]}: give a model another name")
    if not kept:
        raise RecipeError(f"{where} has no cell: expected `models` with `targets`, or `recipes`")
    return Matrix(
        name=str(raw.get("name", path.stem)),
        cells=tuple(kept),
        validate=_effort(raw.get("validate", True), where),
        retries=_count(raw, "retries", 1, where),
        timeout_s=float(_count(raw, "timeout_s", 0, where)) or None,
        device=str(raw.get("device", "cpu")),
        workers=str(raw["workers"]) if "workers" in raw else None,
    )


def _products(raw: Mapping[str, Any], folder: Path, where: str) -> Iterator[MatrixCell]:
    """Models times targets times qualities."""
    targets, qualities = _texts(raw, "targets", where), _texts(raw, "qualities", where)
    for kind, words, known in (("target", targets, TARGETS), ("quality", qualities, QUALITIES)):
        for word in words:
            if word not in known:
                hint = nearest(word, list(known))
                raise RecipeError(f"{where}: there is no {kind} {word!r}{hint}, expected of {', '.join(known)}")
    models = raw.get("models", [])
    if not isinstance(models, list):
        raise RecipeError(f"{where}: models must be a list")
    if models and not targets:
        raise RecipeError(f"{where} names models and no targets: expected some of {', '.join(TARGETS)}")
    each: list[str | None] = [*qualities] or [None]
    for model in models:
        stem, place, revision = _model(model, folder, where)
        for target in targets:
            for quality in each:
                name = "-".join([stem, target, *([quality] if quality else [])])
                recipe, checkpoint = _word(stem, target, place)
                yield MatrixCell(name, recipe, checkpoint, revision, quality)


def _word(stem: str, target: str, place: str) -> tuple[str, str | None]:
    """The recipe of a model for a target, and the checkpoint if that is not the recipe's own."""
    if (named := f"{stem}-{target}") in recipe_names() and place == stem:
        return named, None
    return meant_recipe(target, place), place


def _single(raw: Mapping[str, Any], folder: Path, where: str) -> Iterator[MatrixCell]:
    """Recipes that are named as they are."""
    each: list[str | None] = [*_texts(raw, "qualities", where)] or [None]
    for word in _texts(raw, "recipes", where):
        path = folder / word
        found = str(path.resolve()) if is_path(word) and path.is_file() else word
        for quality in each:
            name = "-".join([Path(word).stem, *([quality] if quality else [])])
            yield MatrixCell(name, found, quality=quality)


def _model(model: Any, folder: Path, where: str) -> tuple[str, str, str | None]:
    """How a model is called in the names of cells, its place, and the revision of a hub id."""
    given = {"checkpoint": model} if isinstance(model, str) else model
    if not isinstance(given, dict):
        raise RecipeError(f"{where}: a model is {model!r:.60}, expected a name, a folder, a hub id or `checkpoint: …`")
    _check_keys(given, _MODEL_KEYS, f"{where}, a model")
    place = given.get("checkpoint", given.get("name"))
    if not isinstance(place, str) or not place:
        raise RecipeError(f"{where}: a model has no checkpoint: name a folder or a hub id")
    stem = re.sub(r"[^\w.+-]+", "-", str(given.get("name", place.rstrip("/").split("/")[-1])))
    local = folder / place
    revision = given.get("revision")
    return stem, str(local.resolve()) if local.exists() else place, None if revision is None else str(revision)


def _with_settings(cell: MatrixCell, raw: Mapping[str, Any], where: str) -> MatrixCell:
    """The cell with the changes that all cells have, and those of the settings that match its name."""
    changes = _texts(raw, "set", where)
    settings = raw.get("settings", [])
    if not isinstance(settings, list) or not all(isinstance(entry, dict) for entry in settings):
        raise RecipeError(f"{where}: settings must be a list of `match: GLOB` with `set: [KEY=VALUE]`")
    for entry in settings:
        _check_keys(entry, _SETTING_KEYS, f"{where}, settings")
        if fnmatchcase(cell.name, str(entry.get("match", "*"))):
            changes += _texts(entry, "set", f"{where}, settings")
    given = {field.name: getattr(cell, field.name) for field in fields(cell)}
    return MatrixCell(**{**given, "changes": tuple(changes)})


def _effort(value: Any, where: str) -> dict[str, int | bool] | None:
    """How much is validated; None for nothing."""
    if isinstance(value, bool):
        return {} if value else None
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: validate is {value!r:.60}, expected true, false, or keys such as `tokens: 500`")
    _check_keys(value, (*_COUNTS, *_SWITCHES), f"{where}, validate")
    for key, entry in value.items():
        wanted = bool if key in _SWITCHES else int
        if type(entry) is not wanted or entry < 0:
            kind = "true or false" if key in _SWITCHES else "a whole number"
            raise RecipeError(f"{where}: validate.{key} is {entry!r:.60}, expected {kind}")
    return dict(value)


def _count(raw: Mapping[str, Any], key: str, default: int, where: str) -> int:
    value = raw.get(key, default)
    if type(value) is not int or value < 0:
        raise RecipeError(f"{where}: {key} is {value!r:.60}, expected a whole number")
    return value


def _texts(raw: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = raw.get(key, [])
    if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
        raise RecipeError(f"{where}: {key} is {value!r:.60}, expected a list of texts")
    return list(value)


def _check_keys(raw: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in raw:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{nearest(str(key), known)}")
