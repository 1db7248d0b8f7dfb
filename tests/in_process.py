"""What most tests do not ask of an export, made cheap: children as calls, one measured speed, no wait for the disk."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, Final
from unittest import mock

from toolkit.apart import ChildFailed

# Modules that have a process of their own, and what each does there.
CALLED_HERE: Final = {
    "toolkit.evaluate.encodes": "_checked",
    "toolkit.evaluate.renders": "_checked",
    "toolkit.evaluate.opens": "_open",
}


def in_this_process(module: str, job: object, **_: object) -> Any:
    """What `run_apart` does, without a process."""
    try:
        work = getattr(importlib.import_module(module), CALLED_HERE[module])
        made = work(json.loads(json.dumps(job)))
        return json.loads(json.dumps(made))
    except Exception as problem:
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise ChildFailed(1, f"error: {reason}") from None


@contextmanager
def short_exports() -> Iterator[None]:
    """Exports of this process open their bundles in it, forecast by one measured speed and wait for no disk.

    tests/test_opens.py opens bundles as users' exports do, as does every command that a test runs in a process of its
    own; tests/test_forecast.py measures anew, and tests/test_power_cut.py sees what is synced.
    """
    from toolkit.pipeline import work

    speed = cache(work.measure_speed)
    with ExitStack() as stack:
        stack.enter_context(mock.patch("toolkit.evaluate.opens.run_apart", in_this_process))
        stack.enter_context(mock.patch("toolkit.pipeline.described.measure_speed", speed))
        stack.enter_context(mock.patch("os.fsync"))
        yield
