"""Phi-3, Phi-3.5 and Phi-4-mini: q, k and v in one tensor, gate and up in another, partial rotary heads, LongRoPE.
modeling_phi3.py of transformers."""

from __future__ import annotations

from toolkit.checkpoint.family import Family, Structure
from toolkit.checkpoint.fields import Fields


def _structure(read: Fields, layers: int) -> Structure:
    window = None if read.get("sliding_window") is None else read.count("sliding_window")
    return Structure(merged=True, sliding_windows=(window,) * layers if window else ())


FAMILY = Family(
    "phi3",
    _structure,
    genai_type="phi3",
    defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    default_positions=4096,
    partial_rotary=True,
)
