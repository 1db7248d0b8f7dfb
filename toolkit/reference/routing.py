"""Which experts a token goes through, and how much it takes of what each gives. T tokens, E experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.family import Experts

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Chosen:
    """An expert by its place, and the places of the tokens that chose it."""

    expert: int
    tokens: NDArray[np.int64]


# Gives the output [T, D] of each expert in order, for the tokens of the normed input [T, D] that chose it.
Elsewhere = Callable[[Array, Sequence[Chosen]], Iterator[Array]]


def routed(routing: Experts, logits: Array) -> Array:
    """Returns how much of each expert's output each token takes, [T, E], 0 for those that it does not go through: the
    softmax of the router's logits [T, E] at the `per_token` highest, over all experts or over these alone."""
    order = np.argsort(-logits, axis=-1, kind="stable")[:, : routing.per_token]
    terms = np.exp(logits - logits.max(axis=-1, keepdims=True))
    chosen = np.zeros_like(terms)
    np.put_along_axis(chosen, order, np.take_along_axis(terms, order, axis=-1), axis=-1)
    shares: Array = chosen / (chosen if routing.normalized else terms).sum(axis=-1, keepdims=True)
    return shares * np.float32(routing.scaling)


def routed_by_groups(routing: Experts, logits: Array, bias: Array) -> Array:
    """Returns the same by sigmoids of the logits, of open groups alone; `bias` [E] takes part in choosing only."""
    assert routing.groups is not None
    (groups, opened), tokens = routing.groups, logits.shape[0]
    affinity = 1 / (1 + np.exp(-logits))
    choice = (affinity + bias).reshape(tokens, groups, -1)
    best = np.sort(choice, axis=-1)[..., -2:].sum(axis=-1)
    shut = np.argsort(-best, axis=-1, kind="stable")[:, opened:]
    np.put_along_axis(choice, shut[..., None], -np.inf, axis=1)
    order = np.argsort(-choice.reshape(tokens, -1), axis=-1, kind="stable")[:, : routing.per_token]
    chosen = np.zeros_like(affinity)
    np.put_along_axis(chosen, order, np.take_along_axis(affinity, order, axis=-1), axis=-1)
    shares: Array = chosen / chosen.sum(axis=-1, keepdims=True)
    return shares * np.float32(routing.scaling)


def chosen_experts(shares: Array) -> list[Chosen]:
    """Returns the experts that some token takes from, by how much each does, [T, E]."""
    places = (np.flatnonzero(shares[:, expert]) for expert in range(shares.shape[1]))
    return [Chosen(expert, tokens) for expert, tokens in enumerate(places) if tokens.size]
