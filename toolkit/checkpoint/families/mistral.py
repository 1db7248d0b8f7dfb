"""Mistral, whose layers all slide or none: modeling_mistral.py of transformers."""

from __future__ import annotations

from toolkit.checkpoint.family import Family, Gguf, Structure
from toolkit.checkpoint.fields import Fields


def _structure(read: Fields, layers: int) -> Structure:
    if read.get("sliding_window") is None:
        return Structure()
    return Structure(sliding_windows=(read.count("sliding_window"),) * layers)


FAMILY = Family(
    "mistral",
    _structure,
    genai_type="mistral",
    defaults={"sliding_window": 4096},
    gguf=Gguf("llama", neighbours=True),
    default_positions=131072,
)
