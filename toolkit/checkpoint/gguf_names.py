"""A checkpoint's tensors under llama.cpp's names, and in its order of rows.

llama.cpp rotates neighbouring pairs (2i, 2i + 1) in some architectures, Hugging Face pairs (i, i + head_dim/2), so
rows of q_proj and k_proj change places there (LlamaModel.permute in llama.cpp's conversion/llama.py).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.families import FAMILIES
from toolkit.checkpoint.family import Family, Gguf

# Llama3's RoPE comes as a divisor of each inverse frequency.
ROPE_FREQS: Final = "rope_freqs.weight"
_OUTSIDE: Final = {names.EMBED_TOKENS: "token_embd", names.FINAL_NORM: "output_norm", names.LM_HEAD: "output"}
_IN_LAYER: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_MODULE_OF: Final = {stored: module for module, stored in (_OUTSIDE | _IN_LAYER).items()}


def families_by_architecture() -> dict[str, Family]:
    """The family that each `general.architecture` is read as. Mistral's files say `llama`, and are read as Llama's."""
    found: dict[str, Family] = {}
    for family in FAMILIES.values():
        if family.gguf is not None:
            found.setdefault(family.gguf.architecture, family)
    return found


def gguf_form(config: ModelConfig) -> Gguf | None:
    """How llama.cpp writes the family of a config; None for one that it has no architecture for."""
    return FAMILIES[config.model_type].gguf


def gguf_name(name: str) -> str:
    """The GGUF name of a checkpoint's tensor: `model.layers.3.mlp.down_proj.weight` is `blk.3.ffn_down.weight`."""
    module, _, kind = name.rpartition(".")
    layer_index = names.layer_of(name)
    if layer_index is None:
        return f"{_OUTSIDE[module]}.{kind}"
    return f"blk.{layer_index}.{_IN_LAYER[module.removeprefix(names.layer_module(layer_index, ''))]}.{kind}"


def checkpoint_name(stored: str) -> str:
    """The checkpoint's name of a GGUF tensor; one that is not known keeps its own."""
    module, _, kind = stored.rpartition(".")
    prefix, _, rest = module.partition(".")
    index, _, inner = rest.partition(".")
    if prefix == "blk" and index.isdecimal() and len(index) < 8 and inner in _MODULE_OF:
        return f"{names.layer_module(int(index), _MODULE_OF[inner])}.{kind}"
    return f"{_MODULE_OF[module]}.{kind}" if module in _OUTSIDE.values() else stored


def rotated_heads(config: ModelConfig, name: str) -> int | None:
    """How many heads a tensor's rows belong to if llama.cpp has them in another order, else None."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    form = gguf_form(config)
    return heads.get(names.role_of(name)) if form and form.neighbours else None


def to_neighbours(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of each head from halves (i, i + Dh/2) to neighbours (2i, 2i + 1)."""
    return np.ascontiguousarray(rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2)).reshape(rows.shape)


def to_halves(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undoes `to_neighbours`: halves of each head apart again."""
    return np.ascontiguousarray(rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2)).reshape(rows.shape)
