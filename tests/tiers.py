"""Which tests are fast: those whose CPU seconds, with those of the fixtures they need, were measured to be few.

`pytest --measure` writes what each test and fixture took into seconds.json, `pytest -m fast` runs what is fast by it;
what has not been measured counts as fast. CPU seconds, of children too, depend on the machine less than a clock does.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

SECONDS_FILE: Final = Path(__file__).with_name("seconds.json")
# A test function with all its cases, or a fixture that others share, beyond this is left out of the fast tier.
FAST_CPU_S: Final = 1.0
# What takes less is not worth a line of the file.
WORTH_A_LINE_CPU_S: Final = 0.5


class Tiers:
    """A plugin that marks fast tests, and measures tests and fixtures when it is asked to."""

    def __init__(self, measure: bool) -> None:
        self._measure = measure
        self._known = _read_seconds()
        self._measured: defaultdict[str, float] = defaultdict(float)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Marks each test that is fast, and so is every fixture it needs; the files that take longest come first, so
        that of two processes neither ends with a long one while the other has nothing left to do."""
        seconds = self._seconds_of_files()
        items.sort(key=lambda item: -seconds[_file(item)])
        for item in items:
            names = [_function(item), *_fixtures(item)]
            if all(self._known.get(name, 0) <= FAST_CPU_S for name in names):
                item.add_marker("fast")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Counts a test's own seconds to its function, whatever the parameters."""
        with self._counted(_function(item)):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
        """Counts a fixture's seconds, without those of the fixtures it asks for, to where it is defined."""
        with self._counted(f"{fixturedef.baseid}::{fixturedef.argname}"):
            return (yield)

    def pytest_sessionfinish(self) -> None:
        """Writes what was measured over what was known of the same tests."""
        if not self._measure:
            return
        known = {name: seconds for name, seconds in _read_seconds().items() if name not in self._measured}
        worth = {name: round(s, 1) for name, s in self._measured.items() if s >= WORTH_A_LINE_CPU_S}
        text = json.dumps(known | worth, indent=0, sort_keys=True, ensure_ascii=False)
        SECONDS_FILE.write_text(text + "\n", encoding="utf-8")

    def _seconds_of_files(self) -> defaultdict[str, float]:
        """What a file's tests and fixtures took together, 0 for one that is not known."""
        found: defaultdict[str, float] = defaultdict(float)
        for name, seconds in self._known.items():
            found[name.split("::")[0]] += seconds
        return found

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        begin = _cpu_s()
        try:
            yield
        finally:
            self._measured[name] += _cpu_s() - begin


def _read_seconds() -> dict[str, float]:
    """CPU seconds by test function and fixture, as they were measured last."""
    known: dict[str, float] = {}
    if SECONDS_FILE.is_file():
        known = json.loads(SECONDS_FILE.read_text(encoding="utf-8"))
    return known


def _cpu_s() -> float:
    """Seconds of all cores that this process and the children it waited for have used."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _file(item: pytest.Item) -> str:
    return item.nodeid.split("::")[0]


def _function(item: pytest.Item) -> str:
    return item.nodeid.split("[")[0]


def _fixtures(item: pytest.Item) -> list[str]:
    """Where each fixture that a test needs may be defined: in its file, or for all."""
    names: list[str] = getattr(item, "fixturenames", [])
    return [f"{place}::{name}" for name in names for place in (_file(item), "tests", "")]
