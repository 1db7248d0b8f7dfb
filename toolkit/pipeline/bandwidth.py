"""How fast this machine reads its memory, which bounds how fast a model decodes; measured once and kept."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from toolkit.files import read_state, write_state
from toolkit.machine import cache_folder, physical_cores, this_machine

_FILE: Final = "memory_bandwidth.json"
# More than any processor's cache holds, read a few times; the best is what a quiet machine does.
_ARRAY_BYTES: Final = 256 << 20
_TIMES: Final = 4


@dataclass(frozen=True)
class MemoryBandwidth:
    """Bytes of memory that all cores of a machine read in a second, and the processor that did."""

    cpu: str
    cores: int
    bytes_per_s: float


def memory_bandwidth(anew: bool = False) -> MemoryBandwidth:
    """Returns what was measured on this processor before, or measures it now, in half a second, and keeps it; where the
    cache folder cannot be written it is measured each time.

    With `anew` it is measured once more, and the larger of both is kept: what else runs only takes from it.
    """
    machine, path = this_machine(), cache_folder() / _FILE
    kept = read_state(MemoryBandwidth, path)
    if kept and ((kept.cpu, kept.cores) != (machine.cpu, machine.cores) or not kept.bytes_per_s > 0):
        kept = None
    if kept and not anew:
        return kept
    made = MemoryBandwidth(machine.cpu, machine.cores, _measured(physical_cores()))
    if kept and kept.bytes_per_s >= made.bytes_per_s:
        return kept
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_state(path, made)
    except OSError:
        pass
    return made


def _measured(threads: int) -> float:
    """Bytes a second of an array's largest values, a share of it a thread: nothing that numpy does reads faster."""
    shares = np.array_split(np.ones(_ARRAY_BYTES // 4, np.float32), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_TIMES):
            start = time.perf_counter()
            list(pool.map(np.max, shares))
            best = min(best, time.perf_counter() - start)
    return _ARRAY_BYTES / best
