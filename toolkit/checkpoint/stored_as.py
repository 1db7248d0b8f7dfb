"""How a checkpoint's weights were stored before they were read, where they were no plain floats."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StoredAs:
    """The type by the file's own word, such as Q4_K_M or fp8, bits a weight over all weights with their scales, and how
    many tensors are of each type."""

    file_type: str
    bits_per_weight: float
    tensors: dict[str, int]

    @property
    def words(self) -> str:
        """Says all of it but the tensors, to go on with."""
        return f"a {self.file_type} file of {self.bits_per_weight:.2f} bits a weight"
