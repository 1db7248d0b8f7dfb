"""Whether each value of a recipe can be; a message says what was found and what is expected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from toolkit.algorithms import ALGORITHMS, AUTO
from toolkit.errors import RecipeError
from toolkit.figures import threshold_names
from toolkit.quality import QUALITIES
from toolkit.recipe.recipe import QuantRule, Recipe
from toolkit.recipe.words import nearest
from toolkit.soc import SOCS
from toolkit.speculation import DRAFT, MTP, NONE, SPECULATIONS
from toolkit.target import TARGETS

RULE_ALGORITHMS: Final = (AUTO, *ALGORITHMS)
BITS: Final = (4, 8)
BLOCK_SIZES: Final = (16, 32, 64, 128, 256)
FIGURES: Final = threshold_names()
# A threshold beyond this is none, and infinity cannot be written down.
_MOST: Final = 1e300
# The figure whose threshold may be left to the checkpoint's size.
_BY_SIZE: Final = "mean_kld"
# What file systems take, less what is put around a bundle's name.
_LONGEST_NAME: Final = 200


def check_rule(rule: QuantRule, where: str) -> None:
    """Raises RecipeError for a rule no kernel could follow."""
    if not isinstance(rule.match, str):
        raise RecipeError(f"{where}: match is {rule.match!r}, expected globs over module names")
    if rule.algorithm not in RULE_ALGORITHMS:
        hint, known = nearest(str(rule.algorithm), RULE_ALGORITHMS), " or ".join(RULE_ALGORITHMS)
        raise RecipeError(f"{where}: algorithm {rule.algorithm!r} is unknown{hint}, expected {known}")
    if not (_is_one_of(rule.bits, BITS) and (rule.block_size == AUTO or _is_one_of(rule.block_size, BLOCK_SIZES))):
        raise RecipeError(
            f"{where}: {rule.bits!r:.40} bits in blocks of {rule.block_size!r:.40}, expected 4 or 8 bits in blocks of "
            f"{', '.join(map(str, BLOCK_SIZES))} or {AUTO}"
        )
    if not isinstance(rule.symmetric, bool):
        raise RecipeError(f"{where}: symmetric is {rule.symmetric!r}, expected true or false")


def _is_one_of(value: object, known: tuple[int, ...]) -> bool:
    """Whether a value is one of these whole numbers; 8.0 is equal to 8 and none."""
    return type(value) is int and value in known


def check_tasks(raw: Any, where: str) -> None:
    """Raises RecipeError unless `raw` is a list of task names."""
    if not isinstance(raw, list | tuple) or not all(isinstance(name, str) and name.isidentifier() for name in raw):
        raise RecipeError(f"{where}: tasks is {raw!r}, expected a list of task names")


def check_target(target: Any, where: str) -> None:
    """Raises RecipeError unless `target` is one of TARGETS."""
    if not isinstance(target, str) or target not in TARGETS:
        hint = nearest(str(target), list(TARGETS))
        raise RecipeError(f"{where}: target {target!r} is unknown{hint}, expected {' or '.join(TARGETS)}")


def check_recipe(recipe: Recipe, where: str) -> None:
    """Raises RecipeError for the first value that cannot be."""
    for key in ("name", "model"):
        value = getattr(recipe, key)
        if not isinstance(value, str) or not value:
            raise RecipeError(f"{where}: {key} is {value!r}, expected a word")
    plain = Path(recipe.name).name == recipe.name and recipe.name.isprintable()
    if not plain or recipe.name.startswith(".") or len(recipe.name.encode()) > _LONGEST_NAME:
        raise RecipeError(
            f"{where}: name {recipe.name!r:.60} must be usable as a folder name, of {_LONGEST_NAME} bytes at most"
        )
    length = recipe.context_length
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise RecipeError(f"{where}: context_length is {length!r}, expected a token count")
    _check_window(recipe, where)
    _check_calibration(recipe, where)
    _check_parts(recipe, where)
    _check_profile(recipe, where)
    _check_speculation(recipe, where)
    if not isinstance(recipe.baseline, bool):
        raise RecipeError(f"{where}: baseline is {recipe.baseline!r}, expected true or false")
    _check_thresholds(recipe.validate, where)


def _check_thresholds(thresholds: dict[str, float | str], where: str) -> None:
    if not isinstance(thresholds, dict):
        raise RecipeError(f"{where}: validate is {thresholds!r:.200}, expected figures with their thresholds")
    for figure, limit in thresholds.items():
        if figure not in FIGURES:
            hint = nearest(str(figure), FIGURES)
            raise RecipeError(f"{where}: validate has no figure {figure!r}{hint}, expected {', '.join(FIGURES)}")
        if figure == _BY_SIZE and limit == AUTO:
            continue
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not abs(limit) < _MOST:
            more = f" or {AUTO}" if figure == _BY_SIZE else ""
            raise RecipeError(f"{where}: validate has {limit!r:.60} for {figure}, expected a number{more}")


def _check_calibration(recipe: Recipe, where: str) -> None:
    if not isinstance(recipe.quality, str) or recipe.quality not in QUALITIES:
        hint = nearest(str(recipe.quality), list(QUALITIES))
        raise RecipeError(f"{where}: quality {recipe.quality!r} is unknown{hint}, expected {' or '.join(QUALITIES)}")
    if not isinstance(recipe.calibration, str) or not recipe.calibration:
        raise RecipeError(f"{where}: calibration is {recipe.calibration!r}, expected the name or path of a text")
    tokens, bits = recipe.calibration_tokens, recipe.bits_per_weight
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
        raise RecipeError(f"{where}: calibration_tokens is {tokens!r}, expected a token count")
    if not isinstance(recipe.fold, bool):
        raise RecipeError(f"{where}: fold is {recipe.fold!r}, expected true or false")
    if not isinstance(recipe.rotate, bool | None):
        raise RecipeError(f"{where}: rotate is {recipe.rotate!r}, expected true or false")
    percentile = recipe.activation_percentile
    if isinstance(percentile, bool) or not isinstance(percentile, int | float) or not 90 <= percentile <= 100:
        raise RecipeError(f"{where}: activation_percentile is {percentile!r}, expected 90 to 100")
    steps = recipe.tuning_steps
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise RecipeError(f"{where}: tuning_steps is {steps!r}, expected a count of steps, or 0 for none")
    if steps and not recipe.calibrated:
        raise RecipeError(f"{where}: tuning_steps is {steps}, and quality {recipe.quality} reads no text to tune on")
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not (bits == 0 or 4 < bits <= 10):
        raise RecipeError(f"{where}: bits_per_weight is {bits!r}, expected a budget above 4, or 0 for none")


def _check_window(recipe: Recipe, where: str) -> None:
    """A prompt is cut into whole windows, and the last one must not reach past the cache."""
    window, length = recipe.window, recipe.context_length
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        raise RecipeError(f"{where}: window is {window!r}, expected a token count")
    if bool(window) != TARGETS[recipe.target].partitioned:
        have = "needs one of at least 2" if TARGETS[recipe.target].partitioned else "has no context stage to give it to"
        raise RecipeError(f"{where}: window is {window}, and target {recipe.target} {have}")
    if window == 1:
        raise RecipeError(f"{where}: window is 1, which is the iterator's: expected at least 2")
    if window and length % window:
        below = length - length % window or window
        raise RecipeError(
            f"{where}: window {window} does not divide context_length {length}: the last window of a prompt would "
            f"reach past the cache; set context_length={below} or another window"
        )


def _check_parts(recipe: Recipe, where: str) -> None:
    """A SoC is for a target that compiles for one, parts for a transformer that is a stage of its own."""
    target, soc, parts = TARGETS[recipe.target], recipe.soc, recipe.parts
    if not isinstance(soc, str) or bool(soc) != bool(target.soc):
        have = f"needs one of {', '.join(SOCS)}" if target.soc else "is not compiled for one"
        raise RecipeError(f"{where}: soc is {soc!r}, and target {recipe.target} {have}")
    if soc and soc not in SOCS:
        raise RecipeError(f"{where}: soc {soc!r} is unknown{nearest(soc, list(SOCS))}, expected {' or '.join(SOCS)}")
    if isinstance(parts, bool) or not isinstance(parts, int) or parts < 0:
        raise RecipeError(f"{where}: parts is {parts!r}, expected a count, or 0 for as few as will compile")
    if parts > 1 and not target.partitioned:
        raise RecipeError(f"{where}: parts is {parts}, and target {recipe.target} has no transformer stage to split")


def _check_profile(recipe: Recipe, where: str) -> None:
    known = [profile.name for profile in TARGETS[recipe.target].profiles]
    if recipe.profile not in (known or [""]):
        named = " or ".join(name or "none" for name in known)
        have = f"has {named}" if known else "has one form alone: leave profile out"
        hint = nearest(str(recipe.profile), known)
        raise RecipeError(f"{where}: profile is {recipe.profile!r}{hint}, and target {recipe.target} {have}")


def _check_speculation(recipe: Recipe, where: str) -> None:
    """Guesses are checked in one graph with a cache of heads, and a draft is named where one guesses."""
    word, draft, target = recipe.speculation, recipe.draft, TARGETS[recipe.target]
    if not isinstance(word, str) or word not in SPECULATIONS:
        hint, known = nearest(str(word), list(SPECULATIONS)), " or ".join(SPECULATIONS)
        raise RecipeError(f"{where}: speculation {word!r:.60} is unknown{hint}, expected {known}")
    if not isinstance(draft, str) or bool(draft) != (word == DRAFT):
        have = "needs a smaller model of the same tokenizer" if word == DRAFT else f"has no use for one: {DRAFT} has"
        raise RecipeError(f"{where}: draft is {draft!r:.60}, and speculation {word} {have}")
    if word == NONE:
        return
    if not target.speculates:
        able = " or ".join(name for name, other in TARGETS.items() if other.speculates)
        why = "is a pipeline" if target.partitioned else "reads several tokens as a prompt of their own"
        raise RecipeError(
            f"{where}: speculation is {word}, and target {target.name} {why}, where guesses cannot be checked: leave "
            f"speculation out, or take {able}"
        )
    if target.in_profile(recipe.profile).form.latent_cache and word != MTP:
        raise RecipeError(
            f"{where}: speculation is {word}, and a cache of latents is copied at every token, guessed ones too: leave "
            f"speculation or profile {recipe.profile} out"
        )


def check_one_checkpoint(recipes: Sequence[Recipe], place: str | None) -> None:
    """Raises RecipeError for recipes that are for several checkpoints, or named twice."""
    if not recipes:
        raise RecipeError("no recipe is named: expected a name, a path or a bare target")
    if not place and len({recipe.model for recipe in recipes}) > 1:
        models = ", ".join(f"{recipe.name} of {recipe.model}" for recipe in recipes)
        raise RecipeError(f"one export reads one checkpoint, and these are {models}: name them one by one")
    named = [recipe.name for recipe in recipes]
    if len(set(named)) < len(named):
        raise RecipeError(f"a recipe is named twice: {', '.join(named)}")
