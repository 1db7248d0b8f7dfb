"""Where a long command is: the phase, how much of it is done, how long it took and will take.

On a terminal that is one line with a bar; elsewhere each step that begins is a plain line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


class FinishedStep(str):
    """The name of a finished step, which knows its phase and how many of the phase's steps are done, `total` of them
    in all or 0 where that is not known."""

    phase: str
    done: int
    total: int

    def __new__(cls, name: str, phase: str = "", done: int = 0, total: int = 0) -> FinishedStep:
        """Makes the name itself with what is known of it."""
        step = super().__new__(cls, name)
        step.phase, step.done, step.total = phase, done, total
        return step


def counted(progress: Callable[[str], None], phase: str, total: int = 0) -> Callable[[str], None]:
    """Returns a callable that takes each step's name and hands it on to `progress` as a step of the phase."""
    done = 0

    def count(name: str) -> None:
        nonlocal done
        done += 1
        progress(FinishedStep(name, phase, done, total))

    return count


@contextmanager
def progress_line(total: int | None = None) -> Iterator[Callable[[str], None]]:
    """Yields a callable that takes the name of each finished step, a `FinishedStep` or a plain one, of which there are
    `total` where that is known; writes to stderr."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    phase, name = TextColumn("{task.fields[phase]}"), TextColumn("{task.description}")
    columns = (phase, BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), name)
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        yield _Bar(shown, total)


class _Bar:
    """One bar, which begins anew with each phase."""

    def __init__(self, shown: Progress, total: int | None) -> None:
        self._shown, self._phase = shown, ""
        self._task = shown.add_task("", total=total, phase="")

    def __call__(self, name: str) -> None:
        step = name if isinstance(name, FinishedStep) else FinishedStep(name)
        if step.phase != self._phase:
            self._phase = step.phase
            self._shown.reset(self._task, total=step.total or None, phase=step.phase)
        if step.done:
            self._shown.update(self._task, description=str(step), completed=step.done)
        else:
            self._shown.update(self._task, description=str(step), advance=1)


class _Lines:
    """A line for each layer, or other step, that is done; a phase whose steps are counted says how far it is."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()
        self._phase, self._begun = "", time.perf_counter()
        self._last = self._begun

    def __call__(self, name: str) -> None:
        step = name if isinstance(name, FinishedStep) else FinishedStep(name)
        if step.phase != self._phase:
            # A step is told when it is done: its phase began with the one before.
            self._phase, self._begun = step.phase, self._last
        self._last = time.perf_counter()
        shown = ".".join(step.split(".")[:3]) if step.startswith("model.layers.") else str(step)
        if (step.phase, shown) not in self._seen:
            sys.stderr.write(self._told(step, shown) + "\n")
            sys.stderr.flush()
        self._seen.add((step.phase, shown))

    def _told(self, step: FinishedStep, shown: str) -> str:
        """`pack 3 of 40, 12 s, about 148 s left: model.layers.0`, as far as it is known."""
        if not step.phase:
            return shown
        passed = time.perf_counter() - self._begun
        if not step.total:
            return f"{step.phase}, {passed:.0f} s: {shown}"
        left = passed / step.done * max(step.total - step.done, 0)
        return f"{step.phase} {step.done} of {step.total}, {passed:.0f} s, about {left:.0f} s left: {shown}"
