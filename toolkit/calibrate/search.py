"""What is decided of one input by a sample of what it was: its channel scales, and what each format would cost it.

K channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.calibrate.facts import InputFacts
from toolkit.quant.activations import InputSample, Rounding
from toolkit.quant.awq import FoldChoice, Reader, choose_scales, output_loss
from toolkit.quant.blockwise import QuantSpec

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Searched:
    """An input: some rows of its readers, a sample of it, and what its products round it to. It is folded by channels
    of equal `shared` [K], if it may be; `solved` is whether a reader makes up for most of what scales would gain.
    `formats` are those that are judged."""

    readers: tuple[Reader, ...]
    sample: InputSample
    rounding: Rounding
    shared: NDArray[np.int64] | None
    solved: bool
    formats: tuple[QuantSpec, ...]


def input_facts(_: None, given: Searched) -> InputFacts:
    """Returns the facts of an input; all that goes in can be sent to another process."""
    fold = FoldChoice()
    if given.shared is not None:
        fold = choose_scales(given.readers, given.sample, given.shared, given.rounding, given.solved)
    scales = fold.scales if fold.scales is not None else np.ones(given.sample.moments.shape, np.float32)
    sample = given.sample.divided(scales)
    losses: dict[QuantSpec, float] = {}
    # A budget changes those that have the first one's format.
    alike = [reader for reader in given.readers if reader.spec == given.readers[0].spec]
    for spec in given.formats:
        asked = [Reader(reader.weight * scales, spec) for reader in alike]
        losses[spec] = sum(output_loss(reader, sample, given.rounding) for reader in asked) / len(asked)
    return InputFacts(sample.moments, sample.values(), fold, losses)
