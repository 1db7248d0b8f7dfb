"""What a recipe says, resolved: every value is there, and has been checked."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from toolkit.algorithms import ALGORITHMS, AUTO, Algorithm, MatrixUse
from toolkit.errors import RecipeError
from toolkit.quality import QUALITIES
from toolkit.recipe.tree import model_facts
from toolkit.speculation import NONE


@dataclass(frozen=True)
class QuantRule:
    """`match` is one or more globs over checkpoint module names, separated by `|`. The algorithm `auto` is the recipe's
    quality's, a block_size `auto` follows from the model's size (sized.py)."""

    match: str
    algorithm: str = AUTO
    bits: int = 4
    block_size: int | str = 32
    symmetric: bool = False

    def matches(self, module: str) -> bool:
        """Whether this rule decides `module`, such as `model.layers.0.mlp.down_proj`."""
        return any(fnmatch.fnmatchcase(module, glob) for glob in _globs(self.match))

    def globs(self) -> list[str]:
        """The globs of `match`, one or several, as a list."""
        return list(_globs(self.match))


@lru_cache(maxsize=1024)
def _globs(match: str) -> tuple[str, ...]:
    return tuple(glob.strip() for glob in match.split("|"))


@dataclass(frozen=True)
class Recipe:
    """One model for one target. Rules are tried in order, the first match wins.

    `context_length`, `quantize`, `validate`, `window`, `soc` and `profile` are the target's own in a recipe that does
    not say them (`Target.defaults`).

    `validate` maps figures of the report to thresholds; that of `mean_kld` may be `auto`, which a plan replaces by what
    follows from the checkpoint's size. `tasks` names question files (JSON lines of `prompt` and `answer`) beside the
    model's facts, and `baseline` asks for plain 4-bit rounding to be measured beside. `window` is how many prompt
    tokens the context stage takes at once, 0 without such a stage. `profile` is one of the target's, where it has
    several. `soc` is what a target with an ahead-of-time compiler compiles for, and `parts` how many parts the
    transformer is split into, 0 for as few as the compiler's limits allow.

    `quality` is a row of QUALITIES. `calibration` names the calibration text, a file beside the model's facts or a
    path, and `calibration_tokens` how much of it is read, 0 for what the quality needs. `fold` allows channel scales
    (AWQ).
    `rotate` turns the residual stream and the values by Hadamard matrices before anything else (QuaRot); unless said,
    where the profile asks for it, or salient channels meet rounding without data.
    `activation_percentile` is how many of the text's tokens, in percent, the ranges of uint16 activations hold whole.
    `bits_per_weight` is a budget that is spent where it helps most, 0 to keep every rule's bits. `tuning_steps` is how
    many steps scales and gains follow the gradient of the mean KLD in the end, on torch, 0 for none.
    `speculation` is a row of SPECULATIONS, and `draft` the smaller model that guesses, named as a checkpoint is; `mtp`
    has the checkpoint's own head for it.
    """

    name: str
    model: str
    target: str
    context_length: int
    quantize: tuple[QuantRule, ...]
    validate: dict[str, float | str] = field(hash=False)
    tasks: tuple[str, ...] = ()
    baseline: bool = False
    window: int = 0
    profile: str = ""
    soc: str = ""
    parts: int = 0
    quality: str = "balanced"
    calibration: str = "calibration"
    calibration_tokens: int = 0
    fold: bool = True
    rotate: bool | None = None
    activation_percentile: float = 100
    bits_per_weight: float = 0
    tuning_steps: int = 0
    speculation: str = NONE
    draft: str = ""

    @property
    def calibrated(self) -> bool:
        """Whether text has to run through the model before its weights are quantized."""
        asked = any(self.algorithm_of(rule).reads_text for rule in self.quantize)
        return asked or QUALITIES[self.quality].tokens > 0

    def algorithm_of(self, rule: QuantRule, use: MatrixUse = MatrixUse.LINEAR) -> Algorithm:
        """The algorithm that a rule names for matrices used so; `auto` leaves it to the quality."""
        quality = QUALITIES[self.quality]
        by_quality = quality.experts if use is MatrixUse.EXPERT else quality.algorithm
        return ALGORITHMS[by_quality if rule.algorithm == AUTO else rule.algorithm]

    def rule_for(self, module: str) -> QuantRule:
        """The rule that decides a module; raises RecipeError if none matches."""
        for rule in self.quantize:
            if rule.matches(module):
                return rule
        raise RecipeError(f"recipe {self.name} has no quantize rule for {module}: end the list with match: '*'")

    def facts(self) -> Path | None:
        """The folder under `models/` with the true config of this recipe's model, if the toolkit has one."""
        return model_facts(self.name, self.target)
