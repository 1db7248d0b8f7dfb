"""The survey of a layer while the one before it is solved: it takes what that leaves idle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from toolkit.device.products import work_behind

Item = TypeVar("Item")


class NotWantedError(Exception):
    """Whoever asked for what was being made is gone."""


@contextmanager
def one_ahead(making: Callable[[Callable[[], None]], Iterator[Item]]) -> Iterator[Iterator[Item]]:
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
            yield _waited_for(thread, items)
        finally:
            ended.set()


def _waited_for(thread: ThreadPoolExecutor, items: Iterator[Item]) -> Iterator[Item]:
    """Yields every item, the next of which is begun before."""
    coming = thread.submit(_next, items)
    while found := coming.result():
        coming = thread.submit(_next, items)
        yield found[0]


def _next(items: Iterator[Item]) -> tuple[Item] | None:
    """Returns the next item in a tuple, or None behind the last."""
    for item in items:
        return (item,)
    return None
