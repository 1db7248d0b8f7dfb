"""What a pool of workers is given beside rows of matrices: sequences through part of a layer, rows of a second moment,
the factor of one, which one process makes while the others have the rest.

Pieces are of one size whatever the number of workers, so that the same products are computed. A worker is sent where
the checkpoint's tensors lie and reads those that its part of a layer takes; of matrices that are solved it is sent
their blocks.
T tokens, D hidden, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from toolkit.calibrate.side_by_side import row_pieces
from toolkit.checkpoint.linears import LinearInput
from toolkit.checkpoint.sublayers import Mixer, Mlp, Moe
from toolkit.device.arrays import NUMPY
from toolkit.device.fitting import Pool
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, dequantize_blocks
from toolkit.quant.gptq import Factor, factorize_ordered, padded
from toolkit.quant.visits import Visits, visits
from toolkit.reference.decoder import Layer
from toolkit.reference.shared import SharedLayer

Floats = NDArray[np.float32]
Sequences = tuple[Floats, tuple[int, ...]]
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


def each_by_rows(
    pool: Pool | None,
    work: Callable[[_Shared, tuple[Floats, ...]], Floats],
    shared: _Shared,
    batches: Iterable[tuple[Floats, ...]],
) -> Iterator[Floats]:
    """Yields what a module's function makes of each batch of arrays [T, ...], whose rows it treats one by one: so that
    a pool has pieces of one size, however long sequences are."""
    if pool is None:
        yield from (work(shared, batch) for batch in batches)
        return
    whole = list(batches)
    cut = [[tuple(x[some] for x in batch) for some in row_pieces(batch[0].shape[0])] for batch in whole]
    made = iter(pool.map(work, shared, [piece for pieces in cut for piece in pieces]))
    for pieces in cut:
        yield np.concatenate([next(made) for _ in pieces])


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
    bare.tensors, bare.elsewhere = {}, None
    packed = {name: matrix for name, matrix in solved.items() if name in kept}
    return Half(bare, half, shared, frozenset(left_out), packed)


def inner(half: Half, piece: Sequences) -> Floats:
    """Returns what the last linear of a sublayer reads, [T, K], for the residual stream [T, D] of some sequences."""
    (x, lengths), layer = piece, half.opened()
    return layer.inner(half.sublayer, layer.normed(half.sublayer, x), lengths)


def inner_of_rows(half: Half, piece: tuple[Floats, ...]) -> Floats:
    """Returns the same for some tokens of an MLP, which looks at no other ones."""
    (x,) = piece
    return inner(half, (x, (x.shape[0],)))


def added(half: Half, piece: tuple[Floats, ...]) -> Floats:
    """Returns the residual stream [T, D] with a sublayer's output added: a piece is what it was, and what the last
    linear reads."""
    x, y = piece
    return half.opened().added(half.sublayer, x, y)


def through(shared: SharedLayer, piece: Sequences) -> tuple[Floats, dict[str, Floats]]:
    """Returns some sequences [T, D] behind a layer, or behind what stands before its experts, and what its linears
    read, by the name of the input."""
    (x, lengths), found, layer = piece, dict[str, Floats](), shared.opened()

    def look(given: LinearInput, values: Floats) -> Floats:
        found[given.name] = values
        return values

    for half in layer.anatomy.sublayers:
        x = x if isinstance(half, Moe) else layer.through(half, x, lengths, look)
    return x, found


@dataclass(frozen=True)
class SharedRows:
    """Matrices of a shared layer, one below the other: the name of each, and how many rows it has."""

    shared: SharedLayer
    tensors: Mapping[str, int]


@dataclass(frozen=True)
class ProductRows:
    """Columns of X~'X~ in the order of visits, down to their square on the diagonal; or rows of X'X~, or of W X'X~ for
    the matrix W of a name."""

    of: str
    rows: slice


_ARRIVING: Final = "arriving"
_EXACT: Final = "exact"


def factored(
    pool: Pool,
    exact: Sequence[Floats],
    arriving: Sequence[Floats],
    rows: SharedRows | None,
    block_sizes: Collection[int],
    meanwhile: Callable[[], None],
) -> tuple[Factor, Floats]:
    """Returns the factor of an input for blocks of these sizes, by what arrives, X~, and of C = X'X~ / T, with the
    exact input X, either W C [N, K], where `rows` are W, or its whitening [K, Kp].

    One process makes the factor while the others do what was begun by `meanwhile`, and the products of C where these
    are less. Raises NotPositiveDefiniteError as `factorize`.
    """
    T, K = sum(len(x) for x in arriving), arriving[0].shape[1]
    diagonal: Floats = np.sum([NUMPY.column_squares(x) for x in arriving], axis=0) / np.float32(T)
    order = visits(diagonal, block_sizes)
    # X~ in the order of visits: to bring its second moment into that afterwards takes as long as half of its factor.
    ordered = np.concatenate([padded(x, order.order.size)[:, order.order] for x in arriving])
    squares = _product_rows({_ARRIVING: order.order.size})
    others = _product_rows(rows.tensors if rows else {_EXACT: K})
    # A row of W X'X~ is a product with X before it is one with X~.
    costs = [(some.rows.stop - some.rows.start) * some.rows.stop for some in squares]
    costs += [(some.rows.stop - some.rows.start) * K * (2 if rows else 1) for some in others]
    # What is less work than the factor is done beside it; more would leave whoever made that waiting.
    beside = others if T * sum(costs[len(squares) :]) < K**3 / 6 else []
    first = squares if beside else [*squares, *others]
    given = rows.shared if rows else None, np.concatenate(exact), ordered, np.argsort(order.order)[:K]
    made = pool.map(_mean_of_products, given, first, costs[: len(first)])
    ended = pool.begin(_factor, (made[: len(squares)], order), (K, T))
    meanwhile()
    cross = pool.map(_mean_of_products, given, beside) if beside else made[len(squares) :]
    factor = ended()
    if rows:
        return factor, np.concatenate(cross)
    starts = [(product.rows.start, part) for product, part in zip(others, cross, strict=True)]
    return factor, np.concatenate(pool.map(_whitened_rows, factor, starts))


def _product_rows(counts: Mapping[str, int]) -> list[ProductRows]:
    return [ProductRows(of, some) for of, count in counts.items() for some in row_pieces(count)]


def _mean_of_products(
    given: tuple[SharedLayer | None, Floats, Floats, NDArray[np.int64]], piece: ProductRows
) -> Floats:
    (shared, exact, ordered, places), some = given, piece.rows
    product: Floats
    if piece.of == _ARRIVING:
        product = ordered[:, : some.stop].T @ ordered[:, some]
    else:
        left: Floats = exact @ shared.read_rows(piece.of, some.start, some.stop).T if shared else exact[:, some]
        product = (left.T @ ordered)[:, places]
    product /= ordered.shape[0]
    return product


def _factor(moment: tuple[Sequence[Floats], Visits], counts: tuple[int, int]) -> Factor:
    (parts, order), (K, T) = moment, counts

    def upper() -> Floats:
        whole: Floats = np.zeros((order.order.size, order.order.size), np.float32)
        for part in parts:
            stop, columns = part.shape
            whole[:stop, stop - columns : stop] = part
        return whole

    return factorize_ordered(upper, order, K, T)


def _whitened_rows(factor: Factor, piece: tuple[int, Floats]) -> Floats:
    start, cross = piece
    return factor.whitening(cross, start)
