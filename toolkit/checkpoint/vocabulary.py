"""A checkpoint with more rows in its embedding and its LM head, for a program that wants two models' logits as wide.

Published sizes of one family pad the same vocabulary to different widths. The rows that are added repeat the last one,
which stands for no token either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.scan import Rows
from toolkit.checkpoint.weights import WeightSource
from toolkit.errors import RecipeError

_WIDENED = (names.weight(names.EMBED_TOKENS), names.weight(names.LM_HEAD))


def widen_vocabulary(checkpoint: Checkpoint, rows: int) -> Checkpoint:
    """The checkpoint with `rows` ids; itself where it has as many. Raises RecipeError where it has more."""
    own = checkpoint.config.vocab_size
    if own == rows:
        return checkpoint
    if own > rows:
        raise RecipeError(f"the draft has {own} ids and the model {rows}: a draft may have as many at most")
    config = replace(checkpoint.config, vocab_size=rows)
    return replace(checkpoint, config=config, source=WideVocabulary(checkpoint.source, own, rows))


def check_same_words(model: Checkpoint, draft: Checkpoint) -> None:
    """Raises RecipeError for a draft whose ids stand for other texts than the model's; checkpoints without a tokenizer
    are taken at their word."""
    theirs, own = model.side.vocabulary, draft.side.vocabulary
    if theirs is None or own is None:
        return
    texts, guessed = ({**given.tokens, **given.added} for given in (theirs, own))
    if texts == guessed:
        return
    other = min(texts.items() ^ guessed.items(), key=lambda entry: (entry[1], entry[0]))
    raise RecipeError(
        f"the draft {draft.folder.name} has another tokenizer than the model: {other[0]!r:.40} is id {other[1]} in one "
        "of them alone; expected a smaller model of the same family"
    )


class WideVocabulary:
    """A `WeightSource` over another, whose embedding and LM head have `rows` rows where that one's have `own`."""

    def __init__(self, source: WeightSource, own: int, rows: int) -> None:
        self._source, self._own, self._rows = source, own, rows
        self.identity, self.digests, self.names = source.identity, source.digests, source.names
        self.bytes_read = source.bytes_read

    def read(self, name: str) -> NDArray[np.float32]:
        """A whole tensor in float32, the added rows behind its own."""
        if name not in _WIDENED:
            return self._source.read(name)
        return self.read_rows(name, 0, self._rows)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of a tensor in float32, of which those beyond its own are the last."""
        if name not in _WIDENED or stop <= self._own:
            return self._source.read_rows(name, start, stop)
        last = self._source.read_rows(name, self._own - 1, self._own)
        added = np.repeat(last, stop - max(start, self._own), axis=0)
        if start >= self._own:
            return added
        return np.concatenate([self._source.read_rows(name, start, self._own), added])

    def scan(self, chunk_bytes: int) -> Iterator[Rows]:
        """As the source's; rows that are added come behind the tensor's last ones, to be made when they are decoded."""
        for rows in self._source.scan(chunk_bytes):
            yield rows
            if rows.name in _WIDENED and rows.stop == self._own:
                yield Rows(rows.name, self._own, self._rows, None)

    def decode(self, rows: Rows, start: int, stop: int) -> NDArray[np.float32]:
        """Some rows of those that `scan` yielded."""
        if rows.name in _WIDENED and rows.start >= self._own:
            return self.read_rows(rows.name, start, stop)
        return self._source.decode(rows, start, stop)
