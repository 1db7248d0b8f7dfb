"""Work that is done on a device as far as its memory goes, and on the CPU beyond."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Final, TypeVar

from toolkit.device.arrays import NUMPY, Device

# Tokens of short sequences that go through a layer together: matrix products want many rows.
TOGETHER: Final = 2048
# Fewer at a time save nothing beside a layer's weights.
_FEWEST: Final = 256
_Made = TypeVar("_Made")


class Fitting:
    """A device, and how many tokens at once its memory has held so far; `note` is told in a line where it is full."""

    def __init__(self, on: Device, note: Callable[[str], None] = lambda _: None) -> None:
        self.on, self.tokens, self._note = on, TOGETHER, note

    def run(self, what: str, work: Callable[[Device, int], _Made]) -> _Made:
        """Returns what `work` makes on the device with so many tokens at once. It is begun again where memory runs out:
        with half as many, in the end on the CPU. The next work tries the device again."""
        on = self.on
        while True:
            try:
                return work(on, self.tokens)
            except Exception as problem:
                if not on.is_out_of_memory(problem):
                    raise
            # Only here is the exception gone, and with it what its frames held.
            gc.collect()
            on.release()
            full = f"{what}: the memory of {on.name} is full with {self.tokens} tokens at a time"
            if self.tokens > _FEWEST:
                self.tokens //= 2
                self._note(f"{full}, going on with {self.tokens}")
            else:
                on = NUMPY
                self._note(f"{full}, computed on the CPU instead")


# numpy's memory is the machine's: where that ends, so does the work.
ON_NUMPY: Final = Fitting(NUMPY)
