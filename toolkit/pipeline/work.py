"""What a phase has to do, counted from shapes, and what this machine does in a second: a forecast divides the two.

The machine is measured in a third of a second. `TYPICAL` is two cores of a laptop: what is sampled is decided by it, so
that a bundle is judged on the same questions wherever it is judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from toolkit.device.arrays import NUMPY, Device


@dataclass(frozen=True)
class Work:
    """An amount of work. `products` are floating-point operations of matrix products, `elements` float32 values that
    one core passes over once, `steps` calls of numpy or nodes of a graph that cost their own overhead, and `nbytes`
    what is copied through memory."""

    products: float = 0.0
    elements: float = 0.0
    steps: float = 0.0
    nbytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.elements + other.elements,
            self.steps + other.steps,
            self.nbytes + other.nbytes,
        )

    def __mul__(self, times: float) -> Work:
        return Work(self.products * times, self.elements * times, self.steps * times, self.nbytes * times)

    def seconds(self, speed: MachineSpeed) -> float:
        """How long it takes a machine of such a speed, one kind of work after the other."""
        return (
            self.products / speed.products_per_s
            + self.elements / speed.elements_per_s
            + self.steps / speed.steps_per_s
            + self.nbytes / speed.bytes_per_s
        )


@dataclass(frozen=True)
class MachineSpeed:
    """What a machine does in a second of each kind of `Work`."""

    products_per_s: float
    elements_per_s: float
    steps_per_s: float
    bytes_per_s: float


# Two cores of 2.6 GHz with AVX2 and nothing beside (LOG.md).
TYPICAL: Final = MachineSpeed(products_per_s=1.7e11, elements_per_s=1.6e9, steps_per_s=3e5, bytes_per_s=6e9)
# Each kind of work is tried for so long.
_SECONDS_EACH: Final = 0.08
# A GPU needs large products to be busy.
_LARGE: Final = 2048
# What numpy does around an array of ordinary size, in calls on a small one.
_SMALL_CALLS: Final = 4.0


def speed_with(speed: MachineSpeed, on: Device) -> MachineSpeed:
    """The speed of a machine whose matrix products are a device's, measured now; itself where that is numpy."""
    if on is NUMPY:
        return speed
    square = on.from_host(np.ones((_LARGE, _LARGE), np.float32))
    # What comes back to the host is known to be done.
    products = _per_second(lambda: on.to_host(on.product(square, square)[:1]), 2.0 * _LARGE**3)
    return replace(speed, products_per_s=products)


def measure_speed() -> MachineSpeed:
    """The speed of this machine as it is now, whatever else runs on it beside."""
    a, b = np.ones((512, 1024), np.float32), np.ones((1024, 1024), np.float32)
    row, few, wide = np.ones(1 << 17, np.float32), np.ones(8, np.float32), np.ones(1 << 24, np.uint8)
    return MachineSpeed(
        products_per_s=_per_second(lambda: NUMPY.product(a, b), 2.0 * 512 * 1024 * 1024),
        elements_per_s=_per_second(lambda: np.exp(row), float(row.size)),
        steps_per_s=_per_second(lambda: few + few, 1 / _SMALL_CALLS, batch=1000),
        bytes_per_s=_per_second(wide.copy, float(wide.size)),
    )


def _per_second(work: Callable[[], object], amount: float, batch: int = 1) -> float:
    """How much of `amount` a second does: a mean over some time, since what runs beside takes its share later too."""
    work()
    start, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < _SECONDS_EACH or not done:
        for _ in range(batch):
            work()
        done += batch
    return done * amount / passed
