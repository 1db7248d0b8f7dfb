"""Typed reads from a config.json; every refusal names file, key, value and expectation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from toolkit.errors import CheckpointError

# What files of transformers' first years have for "none".
NO_TOKEN: Final = -1


class Fields:
    """The keys of one config.json. A key that it lacks has the value in `defaults`, if that has one."""

    def __init__(self, raw: Mapping[str, Any], path: Path, defaults: Mapping[str, Any]) -> None:
        self.path = path
        self._raw = {**defaults, **raw}

    def get(self, key: str) -> Any:
        """Returns the value as JSON has it, None where there is none."""
        return self._raw.get(key)

    def count(self, key: str, default: int | None = None, least: int = 1, most: int = 1 << 31) -> int:
        """Returns a whole number from `least` to `most`; raises CheckpointError for anything else, or for none."""
        value = self.get(key)
        value = whole(default if value is None else value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            expected = "a positive whole number" if least == 1 else f"a whole number from {least} on"
            upto = f" up to {most}" if most < 1 << 31 else ""
            raise CheckpointError(f"{self.path}: {key} is {value!r:.40}, expected {expected}{upto}")
        return value

    def positive(self, key: str, default: float) -> float:
        """Returns a positive number, the default for null; raises CheckpointError for anything else."""
        value = self.get(key)
        return positive(default if value is None else value, key, self.path)

    def flag(self, key: str, *, default: bool) -> bool:
        """Returns true or false; raises CheckpointError for anything else."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {key} is {value!r:.60}, expected true or false")
        return value

    def each_layer(self, key: str, layers: int, allowed: tuple[Any, ...]) -> list[Any] | None:
        """Returns a list's first `layers` entries, None where the key is missing or null.

        Raises CheckpointError for a shorter list, or one with an entry that is not among `allowed`.
        """
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < layers or any(entry not in allowed for entry in value):
            choices = " or ".join(map(str, allowed))
            raise CheckpointError(
                f"{self.path}: {key} is {str(value)[:80]}, expected {choices} for each of the {layers} layers"
            )
        return value[:layers]

    def indices(self, key: str, layers: int) -> tuple[int, ...]:
        """Returns a list of layers' indices, none for null; raises CheckpointError for anything else."""
        value = self.get(key)
        given = [whole(one) for one in value] if isinstance(value, list) else [] if value is None else [value]
        found = [i for i in given if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < layers]
        if not isinstance(value, list | None) or len(found) < len(given):
            raise CheckpointError(f"{self.path}: {key} is {str(value)[:60]}, expected indices of the {layers} layers")
        return tuple(found)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Returns the ids of a number or a list of them, none for null; raises CheckpointError for anything else."""
        value = self.get(key)
        given = [whole(one) for one in ([] if value is None else value if isinstance(value, list) else [value])]
        ids = [i for i in given if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
        if len(ids) < len(given):
            raise CheckpointError(f"{self.path}: {key} is {value!r:.60}, expected token ids")
        return tuple(ids)

    def token_id(self, key: str, rows: int) -> int | None:
        """Returns the first of `token_ids`, None where there is none, or -1, which older files say for it; raises
        CheckpointError for one that is beyond the embedding's rows."""
        ids = () if self.get(key) == NO_TOKEN else self.token_ids(key)
        if ids and ids[0] >= rows:
            raise CheckpointError(f"{self.path}: {key} is {ids[0]}, expected an id below vocab_size {rows}")
        return ids[0] if ids else None


def whole(value: object) -> object:
    """A float without a fraction as the number that it is, which some programs write so; all else as given."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def positive(value: object, key: str, path: Path) -> float:
    """Returns `value` as a float; raises CheckpointError unless it is a positive number of a size that floats have."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise CheckpointError(f"{path}: {key} is {value!r:.60}, expected a positive number")
    return float(value)
