"""What a recipe leaves to its model's size: larger blocks, which a large model loses less by and gains more by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from toolkit.algorithms import AUTO
from toolkit.recipe.recipe import QuantRule

# A model of at most so many parameters has blocks of so many weights where a rule says `auto`. What trained models of
# .5 and 1.5 G lose by either, and what either is read and multiplied with: LOG.md.
_BLOCKS: Final = ((1e9, 32), (float("inf"), 128))


def sized(rules: Sequence[QuantRule], parameters: int) -> tuple[QuantRule, ...]:
    """Returns the rules with numbers in place of `auto` blocks, for a model of so many parameters."""
    blocks = next(block_size for most, block_size in _BLOCKS if parameters <= most)
    return tuple(replace(rule, block_size=blocks) if rule.block_size == AUTO else rule for rule in rules)
