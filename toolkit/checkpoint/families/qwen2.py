"""Qwen2 and Qwen2.5, and their distills: q, k and v always have a bias. modeling_qwen2.py of transformers."""

from __future__ import annotations

from toolkit.checkpoint.family import Family, Gguf, Structure, sliding_windows
from toolkit.checkpoint.fields import Fields


def _structure(read: Fields, layers: int) -> Structure:
    return Structure(qkv_bias=True, sliding_windows=sliding_windows(read, layers))


FAMILY = Family(
    "qwen2",
    _structure,
    genai_type="qwen2",
    defaults={"sliding_window": 4096, "max_window_layers": 28},
    gguf=Gguf("qwen2"),
)
