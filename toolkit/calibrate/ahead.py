"""The survey of a layer while the one before it is solved: it takes what that leaves idle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

from toolkit.device.products import work_behind

Item = TypeVar("Item")


class NotWantedError(Exception):
    """Whoever asked for what was being made is gone."""


class Ahead(Generic[Item]):
    """Items, each of which a thread makes while the one before it is in use: from the beginning on, or, where it
    `waits`, once that is told to."""

    def __init__(self, thread: ThreadPoolExecutor, items: Iterator[Item], waits: bool) -> None:
        self._thread, self._items, self._waits = thread, items, waits
        self._coming: Future[tuple[Item] | None] | None = None

    def begin_next(self) -> None:
        """Begins the item behind the one in use, if nobody did."""
        self._coming = self._coming or self._thread.submit(_next, self._items)

    def __iter__(self) -> Iterator[Item]:
        """Yields every item."""
        while True:
            self.begin_next()
            assert self._coming
            found, self._coming = self._coming.result(), None
            if not found:
                return
            if not self._waits:
                self.begin_next()
            yield found[0]


@contextmanager
def one_ahead(making: Callable[[Callable[[], None]], Iterator[Item]], waits: bool = False) -> Iterator[Ahead[Item]]:
    """Gives the items of an iterator, each of which is made while the one before it is in use.

    `making` returns the iterator; what it is given is to be called between its steps, in whose midst it cannot be
    stopped, and raises NotWantedError once the context ends.
    """
    ended = threading.Event()

    def check() -> None:
        if ended.is_set():
            raise NotWantedError

    items = making(check)
    with ThreadPoolExecutor(1, "one ahead", initializer=work_behind) as thread:
        try:
            yield Ahead(thread, items, waits)
        finally:
            ended.set()


def _next(items: Iterator[Item]) -> tuple[Item] | None:
    """Returns the next item in a tuple, or None behind the last."""
    for item in items:
        return (item,)
    return None
