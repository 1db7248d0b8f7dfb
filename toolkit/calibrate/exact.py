"""What linears read in the checkpoint's own forward, in files from the survey to the solver: it is computed once.

T tokens, K input features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from toolkit.calibrate.activations import ActivationFile
from toolkit.checkpoint.linears import LinearInput
from toolkit.reference.decoder import batched


class ExactInputs:
    """A file [T, K] for each input, until what reads it is solved."""

    def __init__(self, folder: Path, lengths: Sequence[int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._lengths = folder, batched(lengths)

    def file(self, given: LinearInput) -> ActivationFile:
        """Returns an input's file, whether it is there or not."""
        return ActivationFile(self._folder / f"{given.name}.f32", self._lengths, given.width)

    def has(self, inputs: Iterable[LinearInput]) -> bool:
        """Returns whether the files of all these inputs are whole."""
        return all(self.file(given).is_whole() for given in inputs)

    def forget(self, inputs: Iterable[LinearInput]) -> None:
        """Removes the files of inputs whose readers are solved."""
        for given in inputs:
            self.file(given).remove()
