"""What transformers makes of the sequences that a traced bundle is judged on, in place of the toolkit's reference.

T positions, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from toolkit.pipeline.judge.subject import Subject
from toolkit.reference.decoder import Array
from toolkit.trace.reference import TransformersDecoder

# Why figures are absent that take the toolkit's own forward pass.
NO_REFERENCE: Final = "the bundle was traced: its checkpoint runs in transformers alone"


class TracedReference:
    """Logits of the subject's text, and of some sequences `beside` it, as `Reference` gives them."""

    words: Final = "transformers' float32 forward of the checkpoint"

    def __init__(self, subject: Subject, beside: Sequence[list[int]]) -> None:
        subject.progress("logits of the checkpoint through transformers")
        self._decoder, self._sequences = TransformersDecoder(subject.checkpoint.folder), subject.sequences
        self.beside = list(self._decoder.logits(beside))

    def text(self) -> Iterator[tuple[Array, Array | None]]:
        """Yields the logits [T, V] of each sequence of the text; plain rounding's are not known."""
        for logits in self._decoder.logits(self._sequences):
            yield logits, None
