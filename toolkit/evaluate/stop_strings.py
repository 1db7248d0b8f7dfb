"""Strings that end an answer, looked for while it arrives in bits of any length."""

from __future__ import annotations

from toolkit.evaluate.thought import overlap


class StopStrings:
    """Passes text on up to the first of some strings, which may be cut over several bits, and drops the rest."""

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._strings = strings
        self._held = ""
        self.is_found = False

    def add(self, text: str) -> str:
        """Returns the text that is certain once `text` has arrived; what may begin a stop string is held back."""
        if self.is_found or not self._strings:
            return "" if self.is_found else text
        self._held += text
        places = [place for string in self._strings if (place := self._held.find(string)) >= 0]
        if places:
            self.is_found = True
            certain, self._held = self._held[: min(places)], ""
            return certain
        kept = max(overlap(self._held, string) for string in self._strings)
        certain, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return certain

    def end(self) -> str:
        """Returns what was held back, once no more text will come."""
        held, self._held = self._held, ""
        return held
