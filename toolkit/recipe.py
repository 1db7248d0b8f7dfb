"""A YAML recipe, read into a frozen `Recipe`; unknown keys are refused with the nearest known one."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Final

import yaml

from toolkit.errors import RecipeError
from toolkit.names import CONFIG_FILE
from toolkit.quality import CALIBRATED_ALGORITHMS, QUALITIES
from toolkit.soc import SOCS
from toolkit.target import TARGETS

_HERE = Path(__file__).resolve().parent
_ROOTS = (_HERE / "data", _HERE.parent)
ALGORITHMS: Final = ("auto", "rtn", "kquant", "imatrix", "gptq")
BITS: Final = (4, 8)
BLOCK_SIZES: Final = (16, 32, 64, 128, 256)
# Figures of report.json that a recipe may set a threshold on.
FIGURES: Final = (
    "max_abs_logit_error",
    "mean_kld",
    "median_kld",
    "p99_kld",
    "p999_kld",
    "top1_agreement",
    "perplexity",
    "greedy_match_tokens",
    "accuracy",
    "accuracy_drop",
    "ttft_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "peak_rss_bytes",
    "hidden_rms_error",
    "simulator_mean_kld",
    "simulator_accuracy",
    "simulator_accuracy_drop",
)


@dataclass(frozen=True)
class QuantRule:
    """`match` is one or more globs over checkpoint module names, separated by `|`. The algorithm `auto` is the recipe's
    quality's."""

    match: str
    algorithm: str = "auto"
    bits: int = 4
    block_size: int = 32
    symmetric: bool = False

    def matches(self, module: str) -> bool:
        """Whether this rule decides `module`, such as `model.layers.0.mlp.down_proj`."""
        return any(fnmatch.fnmatchcase(module, glob.strip()) for glob in self.match.split("|"))


@dataclass(frozen=True)
class Recipe:
    """One model for one target. Rules are tried in order, the first match wins.

    `validate` maps figures of the report to thresholds. `tasks` names question files (JSON lines of `prompt` and
    `answer`) beside the model's facts, and `baseline` asks for plain 4-bit rounding to be measured beside. `window` is
    how many prompt tokens the context stage takes at once: the target's own unless given, 0 without such a stage.
    `profile` is one of the target's, where it has several. `soc` is what a target with an ahead-of-time compiler
    compiles for, and `parts` how many parts the transformer is
    split into, 0 for as few as the compiler's limits allow.

    `quality` is a row of QUALITIES. `calibration` names its text, a file beside the model's facts or a path, and
    `calibration_tokens` how much of it is read, 0 for what the quality needs. `fold` allows channel scales (AWQ).
    `rotate` turns the residual stream and the values by Hadamard matrices before anything else (QuaRot); unless said,
    where the profile asks for it, or salient channels meet rounding without data.
    `activation_percentile` is how many of the text's tokens, in percent, the ranges of uint16 activations hold whole.
    `bits_per_weight` is a budget that is spent where it helps most, 0 to keep every rule's bits.
    """

    name: str
    model: str
    target: str
    context_length: int
    quantize: tuple[QuantRule, ...]
    validate: dict[str, float]
    tasks: tuple[str, ...] = ()
    baseline: bool = False
    window: int = 0
    profile: str = ""
    soc: str = ""
    parts: int = 0
    quality: str = "fast"
    calibration: str = "calibration"
    calibration_tokens: int = 0
    fold: bool = True
    rotate: bool | None = None
    activation_percentile: float = 100
    bits_per_weight: float = 0

    @property
    def calibrated(self) -> bool:
        """Whether text has to run through the model before its weights are quantized."""
        asked = any(rule.algorithm in CALIBRATED_ALGORITHMS for rule in self.quantize)
        return asked or QUALITIES[self.quality].tokens > 0

    def rule_for(self, module: str) -> QuantRule:
        """The rule that decides a module; raises RecipeError if none matches."""
        for rule in self.quantize:
            if rule.matches(module):
                return rule
        raise RecipeError(f"recipe {self.name} has no quantize rule for {module}: end the list with match: '*'")

    def facts(self) -> Path | None:
        """The folder under `models/` with the true config of this recipe's model, if the toolkit has one."""
        return model_facts(self.name, self.target)


def model_facts(recipe_name: str, target: str) -> Path | None:
    """`models/<model>` for a recipe called `<model>-<target>`, if there is one."""
    folder = data_folder("models") / recipe_name.removesuffix(f"-{target}")
    return folder if (folder / CONFIG_FILE).is_file() else None


def data_folder(kind: str) -> Path:
    """`recipes` or `models`: inside an installed package, or beside it in a checkout."""
    return next((root / kind for root in _ROOTS if (root / kind).is_dir()), _ROOTS[0] / kind)


def recipe_names() -> list[str]:
    """Every recipe in the tree."""
    return sorted(path.stem for path in data_folder("recipes").glob("*.yaml"))


def load_recipe(name_or_path: str, changes: Sequence[str] = (), checkpoint: str | None = None) -> Recipe:
    """A recipe by path, by name, or from a bare target's defaults for `checkpoint`, with `changes` made to it.

    A change is `key=value`, the key a path of dots (`quantize.0.bits=8`), the value YAML. Raises RecipeError with
    what to write instead.
    """
    if name_or_path in TARGETS:
        raw, where = _target_defaults(name_or_path, checkpoint), f"target {name_or_path}"
    else:
        raw, where = _read(_find(name_or_path))
    for change in changes:
        _apply(raw, change)
    return parse_recipe(raw, where)


def parse_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """The recipe that a YAML or JSON object spells, its target's own values where it has none; `where` begins messages.

    Raises RecipeError for unknown keys and for values that cannot be.
    """
    _check_keys(raw, Recipe, where)
    if isinstance(raw["target"], str) and raw["target"] in TARGETS:
        raw.setdefault("window", TARGETS[raw["target"]].window)
        raw.setdefault("soc", TARGETS[raw["target"]].soc)
        raw.setdefault("profile", next((profile.name for profile in TARGETS[raw["target"]].profiles), ""))
    rules = raw["quantize"]
    if not isinstance(rules, list) or not rules:
        raise RecipeError(f"{where}: quantize must be a list of rules")
    recipe = Recipe(
        **{
            **raw,
            "quantize": tuple(_rule(rule, f"{where}, quantize rule {k + 1}") for k, rule in enumerate(rules)),
            "tasks": _names(raw.get("tasks", []), where),
        }
    )
    _check_values(recipe, where)
    return recipe


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        return path
    path = data_folder("recipes") / f"{name_or_path}.yaml"
    if not path.is_file():
        known = [*recipe_names(), *TARGETS]
        raise RecipeError(
            f"no recipe {name_or_path!r}{nearest(name_or_path, known)}: `toolkit recipes` lists them, and the bare "
            f"targets are {', '.join(TARGETS)}"
        )
    return path


def _read(path: Path) -> tuple[dict[str, Any], str]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise RecipeError(f"recipe {path} cannot be read: {' '.join(str(problem).split())[:200]}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"recipe {path} holds a {type(raw).__name__}, expected keys and values")
    return raw, f"recipe {path}"


def _target_defaults(target: str, checkpoint: str | None) -> dict[str, Any]:
    if not checkpoint:
        raise RecipeError(f"{target!r} is a bare target: name what to convert with --checkpoint FOLDER_OR_HUB_ID")
    row = TARGETS[target]
    stem = Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint.rsplit("/", 1)[-1]
    return {
        "name": f"{stem}-{target}",
        "model": checkpoint,
        "target": target,
        "context_length": row.context_length,
        "quantize": [dict(rule) for rule in row.quantize],
        "validate": dict(row.validate),
    }


def _apply(raw: dict[str, Any], change: str) -> None:
    """Sets one value in place; a number in the path indexes a list, and one past its end appends."""
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {change}: expected key=value, such as context_length=8192 or quantize.0.bits=8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"--set {change}: the value is not YAML") from None
    place: Any = raw
    *path, last = key.split(".")
    try:
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place[part]
        if isinstance(place, list):
            place[int(last) : int(last) + 1] = [value]
        else:
            place[last] = value
    except (KeyError, IndexError, ValueError, TypeError):
        raise RecipeError(f"--set {change}: the recipe has no {key!r}") from None


def _rule(raw: Any, where: str) -> QuantRule:
    if not isinstance(raw, dict):
        raise RecipeError(f"{where} is a {type(raw).__name__}, expected keys and values")
    _check_keys(raw, QuantRule, where)
    rule = QuantRule(**raw)
    if not isinstance(rule.match, str):
        raise RecipeError(f"{where}: match is {rule.match!r}, expected globs over module names")
    if rule.algorithm not in ALGORITHMS:
        hint = nearest(str(rule.algorithm), ALGORITHMS)
        raise RecipeError(f"{where}: algorithm {rule.algorithm!r} is unknown{hint}, expected {' or '.join(ALGORITHMS)}")
    if rule.bits not in BITS or rule.block_size not in BLOCK_SIZES or isinstance(rule.bits, bool):
        raise RecipeError(
            f"{where}: {rule.bits!r} bits in blocks of {rule.block_size!r}, expected 4 or 8 bits in blocks of "
            f"{', '.join(map(str, BLOCK_SIZES))}"
        )
    if not isinstance(rule.symmetric, bool):
        raise RecipeError(f"{where}: symmetric is {rule.symmetric!r}, expected true or false")
    return rule


def _names(raw: Any, where: str) -> tuple[str, ...]:
    if not isinstance(raw, list) or not all(isinstance(name, str) and name.isidentifier() for name in raw):
        raise RecipeError(f"{where}: tasks is {raw!r}, expected a list of task names")
    return tuple(raw)


def _check_values(recipe: Recipe, where: str) -> None:
    for key in ("name", "model", "target"):
        value = getattr(recipe, key)
        if not isinstance(value, str) or not value:
            raise RecipeError(f"{where}: {key} is {value!r}, expected a word")
    if Path(recipe.name).name != recipe.name or recipe.name.startswith("."):
        raise RecipeError(f"{where}: name {recipe.name!r} must be usable as a folder name")
    if recipe.target not in TARGETS:
        hint = nearest(recipe.target, list(TARGETS))
        raise RecipeError(f"{where}: target {recipe.target!r} is unknown{hint}, expected {' or '.join(TARGETS)}")
    length = recipe.context_length
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise RecipeError(f"{where}: context_length is {length!r}, expected a token count")
    _check_window(recipe, where)
    _check_calibration(recipe, where)
    _check_parts(recipe, where)
    _check_profile(recipe, where)
    if not isinstance(recipe.baseline, bool):
        raise RecipeError(f"{where}: baseline is {recipe.baseline!r}, expected true or false")
    thresholds = recipe.validate
    if not isinstance(thresholds, dict) or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in thresholds.values()
    ):
        raise RecipeError(f"{where}: validate is {thresholds!r}, expected figures with their thresholds")
    for figure in thresholds:
        if figure not in FIGURES:
            hint = nearest(str(figure), FIGURES)
            raise RecipeError(f"{where}: validate has no figure {figure!r}{hint}, expected {', '.join(FIGURES)}")


def _check_calibration(recipe: Recipe, where: str) -> None:
    if recipe.quality not in QUALITIES:
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
    if parts and not target.partitioned:
        raise RecipeError(f"{where}: parts is {parts}, and target {recipe.target} has no transformer stage to split")


def _check_profile(recipe: Recipe, where: str) -> None:
    known = [profile.name for profile in TARGETS[recipe.target].profiles]
    if recipe.profile not in (known or [""]):
        have = f"has {' or '.join(known)}" if known else "has one form alone: leave profile out"
        hint = nearest(str(recipe.profile), known)
        raise RecipeError(f"{where}: profile is {recipe.profile!r}{hint}, and target {recipe.target} {have}")


def _check_keys(raw: dict[str, Any], kind: type[Any], where: str) -> None:
    known = {field.name: field.default is MISSING for field in fields(kind)}
    for key in raw:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{nearest(str(key), list(known))}")
    for key, required in known.items():
        if required and key not in raw:
            raise RecipeError(f"{where}: key {key!r} is missing")


def nearest(word: str, known: Sequence[str]) -> str:
    """` (did you mean 'x'?)`, or nothing if no known word is near."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
