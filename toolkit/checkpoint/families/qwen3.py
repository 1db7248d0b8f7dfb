"""Qwen3: an RMSNorm over each head of q and k, heads of 128. modeling_qwen3.py of transformers."""

from __future__ import annotations

from toolkit.checkpoint.family import Family, Gguf, Structure, sliding_windows
from toolkit.checkpoint.fields import Fields


def _structure(read: Fields, layers: int) -> Structure:
    attention_bias = read.flag("attention_bias", default=False)
    return Structure(
        qkv_bias=attention_bias, o_bias=attention_bias, qk_norm=True, sliding_windows=sliding_windows(read, layers)
    )


FAMILY = Family(
    "qwen3",
    _structure,
    genai_type="qwen3",
    defaults={"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    gguf=Gguf("qwen3"),
)
