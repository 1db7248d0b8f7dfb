"""What most tests do not ask of an export, made cheap: children as calls, one measured speed, no wait for the disk."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
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


@contextmanager
def single_threads() -> Iterator[None]:
    """Sessions of this process have one thread, whatever a bundle says: on small models a second spins longer than it
    works, and takes the time of the process beside."""
    import onnxruntime
    import onnxruntime_genai

    options, model = onnxruntime.SessionOptions, onnxruntime_genai.Model

    def one_thread() -> onnxruntime.SessionOptions:
        made = options()
        made.intra_op_num_threads = 1
        return made

    with (
        mock.patch("onnxruntime.SessionOptions", one_thread),
        mock.patch("onnxruntime_genai.Model", lambda given: model(_told(given, onnxruntime_genai.Config))),
    ):
        yield


def _told(given: Any, config_of: Callable[[str], Any]) -> Any:
    """What a model is made from, told to use one thread; as it is where it has no settings to tell it by."""
    if not isinstance(given, str):
        return given
    try:
        decoder = json.loads((Path(given) / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        stages = [stage for group in decoder.get("pipeline", []) for stage in group]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return given
    one = {"session_options": {"intra_op_num_threads": 1}}
    config = config_of(given)
    config.overlay(
        json.dumps({"model": {"decoder": one | ({"pipeline": [dict.fromkeys(stages, one)]} if stages else {})}})
    )
    return config
