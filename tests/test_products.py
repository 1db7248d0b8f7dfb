"""numpy's products in pieces: beside float64, whatever the shape, and the same bits on any number of threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from toolkit.device import blas, products
from toolkit.device.arrays import NUMPY
from toolkit.device.blas import one_blas_thread

Floats = NDArray[np.float32]
# The last two of more pieces than one, by columns and by rows.
SHAPES = [(5, 7, 9), (130, 64, 100), (90, 70, 700), (700, 70, 90)]


def _random(*shape: int) -> Floats:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def _all(left: Floats, right: Floats) -> list[Floats]:
    """What products there are make of two matrices."""
    symmetric = _random(len(left), len(left))
    symmetric += symmetric.T
    wide = np.zeros((len(left), right.shape[1] + 3), np.float32)
    NUMPY.subtract_product(wide[:, 2:-1], left, right)
    NUMPY.subtract_square(symmetric, left)
    return [
        NUMPY.product(left, right),
        NUMPY.product(left, np.asfortranarray(right)),
        wide,
        NUMPY.square(left),
        symmetric,
    ]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_FEW", 1 << 18)
    monkeypatch.setattr(products, "_LEAST", 48)
    monkeypatch.setattr(products, "_SUBTRACTED_ROWS", 80)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_float64(shape: tuple[int, int, int]) -> None:
    N, K, T = shape
    left, right = _random(N, K), _random(K, T)
    symmetric = _random(N, N)
    symmetric += symmetric.T
    whole = left.astype(np.float64) @ right
    taken = np.pad(-whole, ((0, 0), (2, 1)))
    square, less = left.T.astype(np.float64) @ left, symmetric - left.astype(np.float64) @ left.T
    for found, expected in zip(_all(left, right), [whole, whole, taken, square, less], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    for found in _all(left, right)[3:]:
        np.testing.assert_allclose(found, found.T, atol=1e-6 * np.abs(found).max())


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_do_not_depend_on_how_many_threads_there_are(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    N, K, T = shape
    left, right, made = _random(N, K), _random(K, T), []
    for count in (1, 2, 5):
        monkeypatch.setattr(products, "threads", lambda count=count: count)
        products._pool.cache_clear()
        made.append(_all(left, right))
    products._pool.cache_clear()
    for others in made[1:]:
        for ours, theirs in zip(made[0], others, strict=True):
            np.testing.assert_array_equal(theirs, ours)


def test_pieces_are_worked_on_side_by_side_and_say_what_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "threads", lambda: 2)
    products._pool.cache_clear()
    both = threading.Barrier(2, timeout=5)
    NUMPY.side_by_side(lambda _: both.wait(), range(2))

    def wrong(piece: int) -> None:
        raise ValueError(f"piece {piece}")

    with pytest.raises(ValueError, match="piece 0"):
        NUMPY.side_by_side(wrong, range(2))
    products._pool.cache_clear()


def test_what_works_behind_waits_for_what_others_ask_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "threads", lambda: 2)
    products._pool.cache_clear()
    order, busy, opened = list[str](), threading.Barrier(3), (threading.Event(), threading.Event())

    def hold(k: int) -> None:
        busy.wait(10)
        opened[k].wait(10)

    def ask_behind() -> None:
        products.work_behind()
        products.side_by_side(order.append, ("behind 1", "behind 2"))

    def asked(ask: Callable[..., None], *arguments: object, waiting: int = 0) -> threading.Thread:
        thread = threading.Thread(target=ask, args=arguments)
        thread.start()
        while len(products._NEXT) + len(products._BEHIND) < waiting:
            time.sleep(0.001)
        return thread

    holding = asked(products.side_by_side, hold, range(2))
    busy.wait(10)
    behind = asked(ask_behind, waiting=2)
    before = asked(products.side_by_side, order.append, ("next 1", "next 2"), waiting=4)
    # One thread of the pool goes on, so that pieces are done in the order they are taken.
    opened[0].set()
    for thread in (before, behind):
        thread.join(10)
    opened[1].set()
    holding.join(10)
    products._pool.cache_clear()
    assert order == ["next 1", "next 2", "behind 1", "behind 2"]


@pytest.fixture
def blas_threads() -> Iterator[Callable[[], int]]:
    """How many threads OpenBLAS takes, of which it has two for a test."""
    found = blas._openblas()
    if found is None:
        pytest.skip("numpy's BLAS here is not OpenBLAS")
    asked, say = found
    before = asked()
    say(2)
    yield asked
    say(before)


def test_numpys_blas_is_held_to_a_thread_until_the_last_lets_it_go(blas_threads: Callable[[], int]) -> None:
    first, second = one_blas_thread(), one_blas_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert blas_threads() == 1
    second.__exit__(None, None, None)
    assert blas_threads() == 2


def test_pieces_side_by_side_have_a_blas_of_one_thread_each(
    blas_threads: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads of OpenBLAS for each of two pieces wait for each other in loops: a forward pass took many times as
    long where nobody had held them before."""
    monkeypatch.setattr(products, "threads", lambda: 2)
    seen = list[int]()
    products.side_by_side(lambda _: seen.append(blas_threads()), range(4))
    assert seen == [1, 1, 1, 1] and blas_threads() == 2


def test_a_product_too_small_for_pieces_has_a_blas_of_one_thread(
    blas_threads: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a few sequences' next tokens are."""
    seen, multiplied = list[int](), np.matmul

    def watched(left: NDArray[np.float32], right: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        seen.append(blas_threads())
        multiplied(left, right, out=out)

    monkeypatch.setattr(np, "matmul", watched)
    left, right = np.ones((8, 4), np.float32), np.ones((4, 2), np.float32)
    assert (NUMPY.product(left, right) == 4).all()
    assert seen == [1] and blas_threads() == 2
