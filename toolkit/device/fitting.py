"""Work that is done on a device as far as its memory goes, and on the CPU beyond."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar

from toolkit.device.arrays import NUMPY, Device

# Tokens of short sequences that go through a layer together, and that a pool works on side by side. Matrix products
# want many rows; but the arrays of more are beyond what the C library keeps for the next ones (32 MiB), so that the
# system clears memory anew for each, a sixth of a pass on one thread (LOG.md).
TOGETHER: Final = 512
# Fewer at a time save nothing beside a layer's weights.
_FEWEST: Final = 128
_Made = TypeVar("_Made")
_Shared = TypeVar("_Shared")
_Piece = TypeVar("_Piece")


class Pool(Protocol):
    """What works on independent pieces side by side, in other processes or on other machines; so many `here` share
    this machine's memory."""

    @property
    def here(self) -> int:
        """How many processes of this machine work on the pieces."""
        ...

    @property
    def behind(self) -> Pool:
        """The same for pieces that are worked on while no other waits."""
        ...

    def map(
        self,
        work: Callable[[_Shared, _Piece], _Made],
        shared: _Shared,
        pieces: Sequence[_Piece],
        costs: Sequence[float] | None = None,
    ) -> list[_Made]:
        """What a module's function makes of each piece and of what all pieces share, in the order of the pieces.
        `costs` is how much work each is beside the others, where they are not alike."""
        ...

    def begin(self, work: Callable[[_Shared, _Piece], _Made], shared: _Shared, piece: _Piece) -> Callable[[], _Made]:
        """Gives one piece, which takes its time, to one process, and returns what waits for it and gives what it makes.
        What is mapped meanwhile goes to the others."""
        ...


class Fitting:
    """A device, and how many tokens at once its memory has held so far; `note` is told in a line where it is full.
    `pool` works on what is independent, if there is one."""

    def __init__(self, on: Device, note: Callable[[str], None] = lambda _: None, pool: Pool | None = None) -> None:
        self.on, self.pool, self._note = on, pool, note
        self.tokens = TOGETHER

    def behind(self) -> Fitting:
        """Returns the same for work that others do not wait for, on another thread."""
        return Fitting(self.on, self._note, self.pool and self.pool.behind)

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
