"""Text that arrives in bits, without the whitespace around the whole of it."""

from __future__ import annotations


class Trimmed:
    """Leaves out whitespace before the first word and after the last: templates and models put line ends around a
    thought. With `trims` false the text passes as it is."""

    def __init__(self, trims: bool) -> None:
        self._trims = trims
        self._begun = False
        self._held = ""

    def add(self, text: str) -> str:
        """Returns what is certain once `text` has arrived; whitespace at its end waits for a word."""
        if not self._trims:
            return str(text)
        text = self._held + text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        certain = text.rstrip()
        self._held = text[len(certain) :]
        return certain
