"""Typed reads from a GGUF file's metadata; every refusal names file, key, value and expectation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from toolkit.checkpoint.gguf_header import Value
from toolkit.errors import CheckpointError

_Element = TypeVar("_Element", int, str)


class Metadata:
    """The metadata of one file. Keys that begin with a dot are the architecture's own: `.block_count` is
    `qwen2.block_count` in a file of Qwen2."""

    def __init__(self, values: Mapping[str, Value], path: Path) -> None:
        self.path, self._values = path, values
        self.architecture = self.text("general.architecture")

    def has(self, key: str) -> bool:
        """Whether the file says anything under a key."""
        return self._key(key) in self._values

    def text(self, key: str, default: str | None = None) -> str:
        """A text; raises CheckpointError for anything else, or for none without a default."""
        value = self._values.get(self._key(key), default)
        if not isinstance(value, str):
            raise self.refused(key, "a text")
        return value

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` on; where a list has one for each layer, the one that all of them have."""
        value = self._values.get(self._key(key), default)
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
            raise self.refused(key, f"a whole number of at least {least}, the same for every layer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. A float32 comes as the shortest decimal that means it: 1e-06, not 9.999999974752427e-07."""
        value = self._values.get(self._key(key), default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refused(key, "a number")
        return shortest(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false; raises CheckpointError for anything else."""
        value = self._values.get(self._key(key), default)
        if not isinstance(value, bool):
            raise self.refused(key, "true or false")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts, empty where there is none."""
        return self._listed(key, str, "a list of texts")

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers, empty where there is none."""
        return self._listed(key, int, "a list of whole numbers")

    def numbers(self, key: str) -> list[float]:
        """A list of finite numbers, empty where there is none."""
        value = self._values.get(self._key(key), [])
        listed = [float(one) for one in value if isinstance(one, int | float)] if isinstance(value, list) else None
        if listed is None or not isinstance(value, list) or len(listed) < len(value):
            raise self.refused(key, "a list of numbers")
        if not all(math.isfinite(one) for one in listed):
            raise self.refused(key, "finite numbers")
        return listed

    def refused(self, key: str, expected: str) -> CheckpointError:
        """The error for a value that is not what was expected."""
        found = repr(self._values.get(self._key(key)))
        return CheckpointError(f"{self.path}: {self._key(key)} is {found[:60]}, expected {expected}")

    def _listed(self, key: str, kind: type[_Element], expected: str) -> list[_Element]:
        value = self._values.get(self._key(key), [])
        if not isinstance(value, list):
            raise self.refused(key, expected)
        listed = [one for one in value if isinstance(one, kind) and not isinstance(one, bool)]
        if len(listed) < len(value):
            raise self.refused(key, expected)
        return listed

    def _key(self, key: str) -> str:
        return f"{self.architecture}{key}" if key.startswith(".") else key


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32."""
    import numpy as np

    return float(str(np.float32(value))) if abs(value) < 3e38 else float(value)
