"""A bundle's logits beside its checkpoint's, some sequences at a time: here, or wherever a pool computes them.

T positions, D hidden, V vocab.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.weights import Tensors
from toolkit.evaluate.parity import Comparison
from toolkit.evaluate.positions import Positions, open_positions
from toolkit.machine import threads
from toolkit.reference.beside import Variant, logits_beside
from toolkit.reference.decoder import Array

# The bundle's logits are taken from one run over this many tokens, and again with the cache over the first of them.
_DECODED_TOKENS: Final = 48
# What this process opened last: opening a bundle takes as long as several sequences.
_OPENED: Final[dict[tuple[str, bool], Positions]] = {}


@dataclass
class Beside:
    """How the bundle compares with its checkpoint (`ours`), and plain rounding with it (`theirs`); the largest error of
    a logit that was made with the cache, and where ORT put the nodes of each stage."""

    ours: Comparison = field(default_factory=Comparison)
    theirs: Comparison = field(default_factory=Comparison)
    cached_error: float = 0.0
    placements: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Shared:
    """What every process needs that compares some sequences: a bundle, with exact activations or as it runs, and its
    checkpoint as far as its head goes, in some variants."""

    bundle: Path
    exact: bool
    config: ModelConfig
    source: Tensors
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Stretch:
    """Some sequences of token ids, and by variant their hidden states [T, D] after the final norm; the `first` one is
    run again with the cache."""

    sequences: list[list[int]]
    hidden: list[list[Array]]
    first: bool


def compare_beside(
    session: Positions, compared: Iterable[tuple[list[int], tuple[Array, Array | None]]], decode: bool
) -> Beside:
    """Returns how a bundle compares on sequences whose logits [T, V] by the checkpoint, and by plain rounding of it,
    are given; with `decode` the first is run again with the cache."""
    found = Beside()
    for k, (ids, (expected, plain)) in enumerate(compared):
        found.ours.add(expected, session.logits(ids), ids)
        if decode and k == 0:
            decoded = session.logits(ids[:_DECODED_TOKENS], prompt=min(len(ids), _DECODED_TOKENS // 2))
            found.cached_error = float(np.abs(decoded - expected[:_DECODED_TOKENS]).max())
        if plain is not None:
            found.theirs.add(expected, plain, ids)
    found.placements = session.placements()
    return found


def compare_stretch(shared: Shared, stretch: Stretch) -> Beside:
    """Returns the same of some sequences, whose logits are made here. Raises FileNotFoundError where the bundle does
    not lie."""
    joined = [np.concatenate(states) for states in stretch.hidden]
    made = logits_beside(shared.config, shared.source, shared.variants, joined)
    ends = np.cumsum([len(ids) for ids in stretch.sequences])[:-1]
    by_variant = [np.split(logits, ends) for logits in made]
    plain: Sequence[Array | None] = by_variant[1] if by_variant[1:] else [None] * len(stretch.sequences)
    compared = zip(stretch.sequences, zip(by_variant[0], plain, strict=True), strict=True)
    return compare_beside(_opened(shared.bundle, shared.exact), compared, stretch.first)


def joined(parts: Sequence[Beside]) -> Beside:
    """Returns what was found of several stretches, in their order."""
    whole = Beside(cached_error=max(part.cached_error for part in parts), placements=parts[0].placements)
    for part in parts:
        whole.ours.take(part.ours)
        whole.theirs.take(part.theirs)
    return whole


def _opened(bundle: Path, exact: bool) -> Positions:
    key = str(bundle), exact
    if key not in _OPENED:
        _OPENED.clear()
        if not bundle.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(bundle))
        _OPENED[key] = open_positions(bundle, exact, threads())
    return _OPENED[key]
