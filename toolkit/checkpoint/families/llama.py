"""Llama 2 and 3, and their distills: modeling_llama.py of transformers."""

from __future__ import annotations

from toolkit.checkpoint.family import Family, Gguf, Structure
from toolkit.checkpoint.fields import Fields


def _structure(read: Fields, layers: int) -> Structure:
    attention_bias = read.flag("attention_bias", default=False)
    return Structure(qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=read.flag("mlp_bias", default=False))


FAMILY = Family("llama", _structure, genai_type="llama", gguf=Gguf("llama", neighbours=True), default_positions=2048)
