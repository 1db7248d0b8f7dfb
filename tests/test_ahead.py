"""What is made one item ahead: in order, beside its use, and no longer once nobody wants it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from toolkit.calibrate.ahead import NotWantedError, one_ahead
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.checkpoint.remembered import LastReader, RememberedWeights


def three_items() -> tuple[list[threading.Event], Callable[[Callable[[], None]], Iterator[int]]]:
    """What makes 0, 1 and 2, and the events that it sets when it begins each, and when it has no more."""
    begun = [threading.Event() for _ in range(4)]

    def making(_: Callable[[], None]) -> Iterator[int]:
        for k in range(3):
            begun[k].set()
            yield k
        begun[3].set()

    return begun, making


def test_the_next_item_is_made_while_one_is_in_use() -> None:
    begun, making = three_items()
    seen = []
    with one_ahead(making) as items:
        for k in items:
            assert begun[k + 1].wait(5), "the next item is not begun before this one is let go"
            assert not any(later.is_set() for later in begun[k + 2 :])
            seen.append(k)
    assert seen == [0, 1, 2]


def test_the_next_item_may_wait_until_it_is_begun() -> None:
    begun, making = three_items()
    with one_ahead(making, waits=True) as items:
        for k in items:
            assert not begun[k + 1].wait(0.1), "the next item is begun before it is told to"
            if k == 1:
                continue  # the next one is made once it is asked for
            items.begin_next()
            assert begun[k + 1].wait(5)
            items.begin_next()
            assert not any(later.is_set() for later in begun[k + 2 :])
    assert begun[3].is_set()


def test_what_nobody_wants_any_more_ends_at_its_next_check() -> None:
    ends, left = list[BaseException](), threading.Event()

    def making(check: Callable[[], None]) -> Iterator[int]:
        yield 0
        left.wait(5)
        try:
            while True:
                check()
        except NotWantedError as ended:
            ends.append(ended)
            raise

    with pytest.raises(KeyboardInterrupt), one_ahead(making) as items:
        assert next(iter(items)) == 0
        left.set()
        raise KeyboardInterrupt
    assert len(ends) == 1 and not any(thread.name.startswith("one ahead") for thread in threading.enumerate())


def test_what_goes_wrong_is_raised_where_its_item_is_asked_for() -> None:
    def making(_: Callable[[], None]) -> Iterator[int]:
        yield 0
        raise ValueError("no second one")

    seen = []
    with pytest.raises(ValueError, match="no second one"), one_ahead(making) as items:
        for k in items:
            seen.append(k)
    assert seen == [0]


def test_a_last_reader_takes_what_was_remembered(tiny_r1: Path) -> None:
    source = open_checkpoint(tiny_r1).source
    name, other = source.names()[:2]
    remembered = RememberedWeights(source)
    last = LastReader(remembered)
    first, kept = remembered.read(name), remembered.read(other)
    read = source.bytes_read()
    assert last.read(name) is first and source.bytes_read() == read
    assert remembered.read(other) is kept and source.bytes_read() == read
    # It is gone: whoever asks again has it read anew, and the last reader remembers nothing.
    again: NDArray[np.float32] = last.read(name)
    assert again is not first and source.bytes_read() > read
    np.testing.assert_array_equal(again, first)
    assert last.read(name) is not again
