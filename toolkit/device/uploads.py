"""Large arrays on their way to a GPU through memory that the system may not move: a piece is copied there while the one
before it crosses the bus, twice as fast as from ordinary memory, which the driver copies piece by piece itself."""

from __future__ import annotations

from typing import Final

import torch

# Float32 elements of a piece, 16 MB, and of the smallest array that is worth two pieces.
_PIECE: Final = 1 << 22
SMALLEST_SENT: Final = 2 * _PIECE


class Uploads:
    """Two pieces of locked memory that every array goes through, made when the first one comes."""

    def __init__(self, to: torch.device) -> None:
        self._to = to
        self._pieces: list[torch.Tensor] = []

    def sent(self, here: torch.Tensor) -> torch.Tensor:
        """Returns a float32 array on the GPU."""
        if not self._pieces:
            self._pieces = [torch.empty(_PIECE, pin_memory=True) for _ in range(2)]
        there = torch.empty(here.shape, dtype=here.dtype, device=self._to)
        source, target = here.view(-1), there.view(-1)
        stream, crossed = torch.cuda.current_stream(self._to), list[torch.cuda.Event]()
        for k, start in enumerate(range(0, source.numel(), _PIECE)):
            piece, some = self._pieces[k % 2], source[start : start + _PIECE]
            if k > 1:
                crossed[k - 2].synchronize()
            piece[: some.numel()].copy_(some)
            target[start : start + _PIECE].copy_(piece[: some.numel()], non_blocking=True)
            crossed.append(stream.record_event())
        # The next array's pieces are copied over these.
        crossed[-1].synchronize()
        return there
