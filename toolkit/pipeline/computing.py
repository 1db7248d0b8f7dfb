"""What computes for a command: a device, or the processes of a pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from toolkit.device.blas import one_blas_thread
from toolkit.device.chosen import chosen_device
from toolkit.device.fitting import Fitting
from toolkit.device.words import CPU
from toolkit.errors import UnsupportedError
from toolkit.workers.pool import open_pool


@contextmanager
def computing(device: str, workers: str | None, note: Callable[[str], None]) -> Iterator[Fitting]:
    """Yields what `--device` and `--workers` name, as long as it is open.

    Raises UnsupportedError for workers that are asked to compute on another device than they do, MachineError where
    there are none.
    """
    on = chosen_device(device)
    if workers is not None and on.name != CPU:
        raise UnsupportedError("--workers compute on numpy: leave --device out, or --workers")
    with open_pool(workers) as pool, one_blas_thread():
        yield Fitting(on, note, pool)
