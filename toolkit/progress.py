"""Where a long command is: a bar on a terminal, one plain line a layer elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_line(total: int | None) -> Iterator[Callable[[str], None]]:
    """Yields a callable that takes the name of each finished step, of `total` where that is known; writes to stderr."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [BarColumn(), MofNCompleteColumn()] if total else []
    line = Progress(
        *columns, TimeElapsedColumn(), TextColumn("{task.description}"), console=Console(stderr=True), transient=True
    )
    with line:
        task = line.add_task("", total=total)
        yield lambda name: line.update(task, advance=1, description=name)


class _Lines:
    """One line for each layer, or other step, that begins."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, name: str) -> None:
        step = ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else name
        if step not in self._seen:
            sys.stderr.write(step + "\n")
            sys.stderr.flush()
        self._seen.add(step)
