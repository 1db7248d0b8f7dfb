"""Nanoseconds a weight and SQNR of each quantizer on 2 Mi Gaussian weights, on one core and on two: kernel_speed.py."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from toolkit.algorithms import DATA_FREE
from toolkit.quant.blockwise import QuantSpec, quantize_blocks

REPEAT = 9


def seconds(work: Callable[[], object]) -> float:
    """The median of REPEAT runs after one that compiles."""
    work()
    times = []
    for _ in range(REPEAT):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def side_by_side(weight: NDArray[np.float32], spec: QuantSpec) -> None:
    """Quantizes the weight in two threads at once."""
    threads = [threading.Thread(target=quantize_blocks, args=(weight, spec)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    """Prints a line for each algorithm and format."""
    weight = np.random.default_rng(0).standard_normal((409, 5120), np.float32)
    for algorithm in DATA_FREE:
        for bits, block_size, symmetric in ((4, 32, False), (4, 32, True), (4, 128, False), (8, 128, False)):
            spec = QuantSpec(bits, block_size, symmetric, algorithm)
            alone = seconds(partial(quantize_blocks, weight, spec)) / weight.size
            both = seconds(partial(side_by_side, weight, spec)) / weight.size / 2
            sqnr = 10 * np.log10(float(np.vdot(weight, weight)) / quantize_blocks(weight, spec).noise)
            print(f"{spec}: {alone * 1e9:.2f} ns a weight, {both * 1e9:.2f} with two threads, {sqnr:.2f} dB")


if __name__ == "__main__":
    main()
