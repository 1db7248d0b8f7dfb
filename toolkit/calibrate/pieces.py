"""What a pool of workers is given beside rows of matrices: sequences through part of a layer, rows of a second moment.

Pieces are of one size whatever the number of workers, so that the same products are computed. A worker is sent the
weights that its part of a layer takes, and no checkpoint.
T tokens, D hidden, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.sublayers import Attention, LatentAttention, LinearInput, Mlp
from toolkit.device.fitting import Pool
from toolkit.reference.decoder import Layer

Floats = NDArray[np.float32]
Sequences = tuple[Floats, tuple[int, ...]]
# Rows of a moment that are computed at once.
_ROWS: Final = 1024
_Shared = TypeVar("_Shared")
_Piece = TypeVar("_Piece")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Half:
    """A sublayer, and the layer with the weights that are needed of it."""

    layer: Layer
    sublayer: Attention | LatentAttention | Mlp


def each(
    pool: Pool | None, work: Callable[[_Shared, _Piece], _Made], shared: _Shared, pieces: Iterable[_Piece]
) -> Iterator[_Made]:
    """Yields what a module's function makes of each piece, here one after the other where there is no pool."""
    return (work(shared, piece) for piece in pieces) if pool is None else iter(pool.map(work, shared, list(pieces)))


def reading(layer: Layer, half: Attention | LatentAttention | Mlp, inputs: Sequence[LinearInput]) -> Half:
    """Returns a sublayer with the weights alone that read these of its inputs."""
    kept = {linear.weight for given in inputs for linear in given.linears}
    left_out = {linear.weight for other in layer.anatomy.inputs for linear in other.linears} - kept
    some = copy(layer)
    some.tensors = {name: tensor for name, tensor in layer.tensors.items() if name not in left_out}
    return Half(some, half)


def inner(half: Half, piece: Sequences) -> Floats:
    """Returns what the last linear of a sublayer reads, [T, K], for the residual stream [T, D] of some sequences."""
    x, lengths = piece
    return half.layer.inner(half.sublayer, half.layer.normed(half.sublayer, x), lengths)


def added(half: Half, piece: tuple[Floats, Floats]) -> Floats:
    """Returns the residual stream [T, D] with a sublayer's output added: a piece is what it was, and what the last
    linear reads."""
    return half.layer.added(half.sublayer, *piece)


def through(layer: Layer, piece: Sequences) -> tuple[Floats, dict[str, Floats]]:
    """Returns some sequences [T, D] behind a layer, and what its linears read, by the name of the input."""
    (x, lengths), found = piece, dict[str, Floats]()

    def look(given: LinearInput, values: Floats) -> Floats:
        found[given.name] = values
        return values

    for half in layer.anatomy.sublayers:
        x = layer.through(half, x, lengths, look)
    return x, found


def means_of_products(
    pool: Pool, exact: Sequence[Floats], arriving: Sequence[Floats], rows: Floats | None
) -> tuple[Floats, Floats]:
    """Returns X~'X~ / T [K, K] of what arrives, X~, and with X, the exact input, X'X~ / T [K, K], or W X'X~ / T [N, K]
    where `rows` has W [N, K]."""
    left = list(exact) if rows is None else pool.map(_times_rows, rows, exact)
    both = np.concatenate(arriving), np.concatenate(left)
    slices = [
        (which, slice(start, start + _ROWS)) for which in (0, 1) for start in range(0, both[which].shape[1], _ROWS)
    ]
    made = pool.map(_product_rows, both, slices)
    first = -(-both[0].shape[1] // _ROWS)
    moment, cross = np.concatenate(made[:first]), np.concatenate(made[first:])
    moment /= both[0].shape[0]
    cross /= both[0].shape[0]
    return moment, cross


def _times_rows(rows: Floats, x: Floats) -> Floats:
    product: Floats = x @ rows.T
    return product


def _product_rows(both: tuple[Floats, Floats], piece: tuple[int, slice]) -> Floats:
    which, some = piece
    product: Floats = both[which][:, some].T @ both[0]
    return product
