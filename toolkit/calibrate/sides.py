"""The two streams through a layer that is being solved: the checkpoint's own, and the one that rounded matrices make.

T tokens, K input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit.calibrate.activations import Activations
from toolkit.calibrate.exact import ExactInputs
from toolkit.calibrate.pieces import Half, SolvedMatrix, added, each, each_by_rows, inner, inner_of_rows, reading
from toolkit.checkpoint.linears import LinearInput
from toolkit.checkpoint.sublayers import Mixer, Mlp, Moe, Sublayer
from toolkit.device.arrays import Device
from toolkit.device.fitting import Pool
from toolkit.reference.decoder import Layer, Look, unseen
from toolkit.reference.shared import SharedLayer

Floats = NDArray[np.float32]


class Side(Protocol):
    """One of the two streams through a layer: what its linears read, half by half, [T, K] of some sequences at a
    time."""

    def reads(self, half: Sublayer, given: LinearInput) -> Iterator[Floats]:
        """What the linears behind an input of a half read, once those before it are solved."""
        ...

    def step(self, half: Sublayer, look: Look = unseen) -> None:
        """Takes the stream on to where a half has added to it; `look` sees what linears of experts read, each expert's
        tokens of the whole text at once."""
        ...


class KeptSide:
    """The exact stream as the survey saw it, each input divided by the scales that are folded into it."""

    def __init__(
        self, kept: ExactInputs, scales: Mapping[str, Floats], on: Device, lengths: Sequence[tuple[int, ...]]
    ) -> None:
        self._kept, self._scales, self._on, self._lengths = kept, scales, on, lengths

    def values(self, given: LinearInput) -> Iterator[Floats]:
        """Yields the values of an input as its folded readers take it."""
        scales = self._scales.get(given.name)
        divisor = None if scales is None else self._on.from_host(scales)
        for x, _ in self._kept.file(given).read_by(self._on, self._lengths):
            yield x if divisor is None else x / divisor

    def reads(self, half: Sublayer, given: LinearInput) -> Iterator[Floats]:
        """Yields what the linears there read, as `Side` says."""
        return self.values(given)

    def step(self, half: Sublayer, look: Look = unseen) -> None:
        """Does nothing: what is behind a half was kept too."""
        return None


class ComputedSide:
    """A stream through a layer; `spill` gives it places for what stands in between, a pool works on sequences side by
    side. Its processes read what is `shared`, and are sent those of `solved` as they are."""

    def __init__(
        self,
        layer: Layer,
        before: Activations,
        after: Activations,
        spill: Callable[[str, int], Activations],
        pool: Pool | None,
        shared: SharedLayer | None,
        solved: Mapping[str, SolvedMatrix],
    ) -> None:
        self._layer, self._spill, self._stream, self._after, self._pool = layer, spill, before, after, pool
        self._shared, self._solved = shared, solved
        self._inner: Activations | None = None

    def reads(self, half: Sublayer, given: LinearInput) -> Iterator[Floats]:
        """Yields what the linears there read, as `Side` says. What the last linear of a half reads is kept:
        what stands behind the half is made of it too."""
        if isinstance(half, Moe) or given != half.inner_input:
            return (self._layer.reads(half, given, x) for x, _ in self._stream)
        return (y for y, _ in self._inner_values(half))

    def step(self, half: Sublayer, look: Look = unseen) -> None:
        """Writes the stream behind a half: between the two to a spill, in the end to the file after the layer."""
        last = half is self._layer.anatomy.sublayers[-1]
        after = self._after if last else self._spill("middle", self._layer.config.hidden_size)
        self._stream, self._inner = after.write(self._behind(half, look)), None

    def _behind(self, half: Sublayer, look: Look) -> Iterator[Floats]:
        """What stands behind a half, of some sequences at a time; experts go by here, one after the other, each once
        for the whole text."""
        if isinstance(half, Moe):
            whole = self._layer.on.concatenate([x for x, _ in self._stream])
            return iter([self._layer.through(half, whole, look=look)])
        pairs = ((x, y) for (x, _), (y, _) in zip(self._stream, self._inner_values(half), strict=True))
        return each_by_rows(self._pool, added, self._reading(half, [half.inner_input]), pairs)

    def _inner_values(self, half: Mixer | Mlp) -> Activations:
        if self._inner is None:
            shared = self._reading(half, half.inputs[:-1])
            if isinstance(half, Mlp):
                read = each_by_rows(self._pool, inner_of_rows, shared, ((x,) for x, _ in self._stream))
            else:
                read = each(self._pool, inner, shared, self._stream)
            self._inner = self._spill(half.inner_input.name, half.inner_input.width).write(read)
        return self._inner

    def _reading(self, half: Mixer | Mlp, inputs: Sequence[LinearInput]) -> Half:
        return reading(self._layer, half, inputs, self._shared, self._solved)
