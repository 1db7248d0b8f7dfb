"""What a pool of workers is given beside rows of matrices: sequences through part of a layer, rows of a second moment,
the factor of one.

Pieces are of one size whatever the number of workers, so that the same products are computed. A worker is sent where
the checkpoint's tensors lie and reads those that its part of a layer takes; of matrices that are solved it is sent
their blocks.
T tokens, D hidden, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.linears import LinearInput
from toolkit.checkpoint.sublayers import Mixer, Mlp
from toolkit.device.arrays import device_of
from toolkit.device.fitting import Pool
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, dequantize_blocks
from toolkit.quant.gptq import Factor, factorize
from toolkit.reference.decoder import Layer
from toolkit.reference.shared import SharedLayer

Floats = NDArray[np.float32]
Sequences = tuple[Floats, tuple[int, ...]]
# Rows of a moment that are computed at once: so few that narrow matrices too are work for several.
_ROWS: Final = 256
_Shared = TypeVar("_Shared")
_Piece = TypeVar("_Piece")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class SolvedMatrix:
    """A matrix that is solved, an eighth of what its floats take."""

    blocks: QuantizedBlocks
    spec: QuantSpec
    width: int

    def restored(self) -> Floats:
        """Returns the float32 [N, K] that the blocks stand for."""
        return dequantize_blocks(self.blocks, self.spec, self.width)


@dataclass(frozen=True)
class Half:
    """A sublayer of a layer that has its tensors, or of one whose tensors are `shared`: then whoever computes with it
    reads them, without those that are left out, and with those that are solved as these are."""

    layer: Layer
    sublayer: Mixer | Mlp
    shared: SharedLayer | None = None
    left_out: frozenset[str] = frozenset()
    solved: Mapping[str, SolvedMatrix] = field(default_factory=dict)

    def opened(self) -> Layer:
        """Returns the layer with the tensors that the sublayer takes."""
        if self.shared is None:
            return self.layer
        opened, shared = copy(self.layer), self.shared
        restored = {name: shared.kept(f"{name} solved", packed.restored) for name, packed in self.solved.items()}
        opened.tensors = shared.opened(self.left_out | restored.keys()).tensors | restored
        return opened


def each(
    pool: Pool | None, work: Callable[[_Shared, _Piece], _Made], shared: _Shared, pieces: Iterable[_Piece]
) -> Iterator[_Made]:
    """Yields what a module's function makes of each piece, here one after the other where there is no pool."""
    return (work(shared, piece) for piece in pieces) if pool is None else iter(pool.map(work, shared, list(pieces)))


def reading(
    layer: Layer,
    half: Mixer | Mlp,
    inputs: Sequence[LinearInput],
    shared: SharedLayer | None,
    solved: Mapping[str, SolvedMatrix],
) -> Half:
    """Returns a sublayer with the weights alone that read these of its inputs, where others are sent it."""
    if shared is None:
        return Half(layer, half)
    kept = {linear.weight for given in inputs for linear in given.linears}
    left_out = {linear.weight for other in layer.anatomy.inputs for linear in other.linears} - kept
    bare = copy(layer)
    bare.tensors = {}
    packed = {name: matrix for name, matrix in solved.items() if name in kept}
    return Half(bare, half, shared, frozenset(left_out), packed)


def inner(half: Half, piece: Sequences) -> Floats:
    """Returns what the last linear of a sublayer reads, [T, K], for the residual stream [T, D] of some sequences."""
    (x, lengths), layer = piece, half.opened()
    return layer.inner(half.sublayer, layer.normed(half.sublayer, x), lengths)


def added(half: Half, piece: tuple[Floats, Floats]) -> Floats:
    """Returns the residual stream [T, D] with a sublayer's output added: a piece is what it was, and what the last
    linear reads."""
    return half.opened().added(half.sublayer, *piece)


def through(shared: SharedLayer, piece: Sequences) -> tuple[Floats, dict[str, Floats]]:
    """Returns some sequences [T, D] behind a layer, and what its linears read, by the name of the input."""
    (x, lengths), found, layer = piece, dict[str, Floats](), shared.opened()

    def look(given: LinearInput, values: Floats) -> Floats:
        found[given.name] = values
        return values

    for half in layer.anatomy.sublayers:
        x = layer.through(half, x, lengths, look)
    return x, found


@dataclass(frozen=True)
class SharedRows:
    """Matrices of a shared layer, one below the other."""

    shared: SharedLayer
    tensors: tuple[str, ...]


def means_of_products(
    pool: Pool, exact: Sequence[Floats], arriving: Sequence[Floats], rows: SharedRows | None
) -> tuple[list[Floats], list[Floats]]:
    """Returns X~'X~ / T [K, K] of what arrives, X~, and with X, the exact input, X'X~ / T [K, K], or W X'X~ / T [N, K]
    where `rows` are W [N, K], some rows of each at a time."""
    left = list(exact) if rows is None else pool.map(_times_rows, rows, exact)
    both = np.concatenate(arriving), np.concatenate(left)
    slices = [
        (which, slice(start, start + _ROWS)) for which in (0, 1) for start in range(0, both[which].shape[1], _ROWS)
    ]
    made = pool.map(_mean_of_product_rows, both, slices)
    first = -(-both[0].shape[1] // _ROWS)
    return made[:first], made[first:]


def _times_rows(rows: SharedRows, x: Floats) -> Floats:
    return np.concatenate([x @ rows.shared.read(tensor).T for tensor in rows.tensors], axis=1)


def _mean_of_product_rows(both: tuple[Floats, Floats], piece: tuple[int, slice]) -> Floats:
    which, some = piece
    product: Floats = both[which][:, some].T @ both[0]
    product /= both[0].shape[0]
    return product


@dataclass(frozen=True)
class Moments:
    """X~'X~ / T [K, K] of an input as it arrives, and X'X~ / T [K, K] where that is to whiten rows, in pieces of rows;
    `tokens` is T."""

    arriving: Sequence[Floats]
    cross: Sequence[Floats] | None
    tokens: int


def factored(pool: Pool | None, moments: Moments, block_size: int) -> tuple[Factor, Floats | None]:
    """Returns the factor of an input for blocks of `block_size`, and the whitening [K, Kp] of its X'X~ / T; a pool
    makes both in one of its processes, beside what others do. Raises NotPositiveDefiniteError as `factorize`."""
    return next(each(pool, _factored, moments, [block_size]))


def _factored(moments: Moments, block_size: int) -> tuple[Factor, Floats | None]:
    on = device_of(moments.arriving[0])
    factor = factorize(on.concatenate(moments.arriving), block_size, moments.tokens)
    return factor, None if moments.cross is None else factor.whitening(on.concatenate(moments.cross))
