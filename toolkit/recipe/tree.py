"""The recipes and the models' facts that come with the toolkit, and which of them a user's word means."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Final

from toolkit.errors import RecipeError
from toolkit.names import CONFIG_FILE
from toolkit.recipe.words import nearest
from toolkit.target import TARGETS

_PACKAGE: Final = Path(__file__).resolve().parent.parent
_ROOTS: Final = (_PACKAGE / "data", _PACKAGE.parent)
# For a model without a target: it runs everywhere.
_DEFAULT_TARGET: Final = "cpu"
_MODEL_LINE: Final = re.compile(r"^model:\s*([^\s#]+)", re.MULTILINE)


def data_folder(kind: str) -> Path:
    """Returns `recipes` or `models`: inside an installed package, or beside it in a checkout."""
    return next((root / kind for root in _ROOTS if (root / kind).is_dir()), _ROOTS[0] / kind)


def recipe_names() -> list[str]:
    """Returns the name of every recipe that comes with the toolkit, sorted."""
    return sorted(path.stem for path in data_folder("recipes").glob("*.yaml"))


def model_names() -> list[str]:
    """Returns the name of every model that a recipe is for, without its target, sorted."""
    return sorted({name.removesuffix(f"-{_target_of(name)}") for name in recipe_names() if _target_of(name)})


def model_facts(recipe_name: str, target: str) -> Path | None:
    """Returns `models/<model>` for a recipe called `<model>-<target>`, if there is one."""
    folder = data_folder("models") / recipe_name.removesuffix(f"-{target}")
    return folder if (folder / CONFIG_FILE).is_file() else None


def known_license(recipe_name: str, target: str) -> str | None:
    """Returns the licence of a model that the toolkit has facts of, in the hub's words, None of another."""
    return _licenses().get(recipe_name.removesuffix(f"-{target}"))


@cache
def _licenses() -> dict[str, str]:
    path = data_folder("models") / "licenses.json"
    return {str(model): str(row["license"]) for model, row in json.loads(path.read_text(encoding="utf-8")).items()}


def meant_recipe(word: str, checkpoint: str | None) -> str:
    """Returns the recipe that a target for a known model's checkpoint means, or a known model's hub id; else `word`.

    `cpu` for `deepseek-ai/DeepSeek-R1-Distill-Qwen-14B` is `14b-cpu`, and the hub id alone is that as well.
    """
    model, target = (checkpoint, word) if word in TARGETS else (word if "/" in word else None, _DEFAULT_TARGET)
    recipes = _recipes_of(model) if model else []
    return next((name for name in recipes if name.endswith(f"-{target}") and _target_of(name) == target), word)


def find_recipe(name_or_path: str) -> Path:
    """Returns the YAML file of a path or of a name; raises RecipeError with what to write instead."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        return path
    path = data_folder("recipes") / f"{name_or_path}.yaml"
    if path.is_file():
        return path
    raise RecipeError(f"no recipe {name_or_path!r}{_suggestion(name_or_path)}")


def _suggestion(word: str) -> str:
    known = recipe_names()
    targets = [target for target in TARGETS if f"{word}-{target}" in known]
    if targets:
        return f": {word} is a model, name its target too: {', '.join(f'{word}-{target}' for target in targets)}"
    listed = "`toolkit recipes` lists them"
    if "/" in word or Path(word).is_dir():
        return f": {listed}; for another model name a target, `toolkit export {_DEFAULT_TARGET} --checkpoint {word}`"
    return f"{nearest(word, [*known, *TARGETS])}: {listed}, and the bare targets are {', '.join(TARGETS)}"


def _recipes_of(model: str) -> list[str]:
    """The recipes of a model by its hub id, which the hub finds in any case, or by its embedded name."""
    return [name for name, of in _models().items() if of.lower() == model.lower()]


@cache
def _models() -> dict[str, str]:
    """Each recipe's `model:`, read without parsing the YAML: dozens of files for one word."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in data_folder("recipes").glob("*.yaml")}
    lines = {name: _MODEL_LINE.search(text) for name, text in texts.items()}
    return {name: line.group(1) for name, line in lines.items() if line}


def _target_of(name: str) -> str:
    """The target in a recipe's name: the longest that it ends in."""
    return max((target for target in TARGETS if name.endswith(f"-{target}")), key=len, default="")
