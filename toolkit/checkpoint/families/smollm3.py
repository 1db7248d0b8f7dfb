"""SmolLM3: every fourth layer, or those a list names, has no RoPE. modeling_smollm3.py of transformers."""

from __future__ import annotations

from toolkit.checkpoint.family import Family, Gguf, Structure, sliding_windows
from toolkit.checkpoint.fields import Fields


def _structure(read: Fields, layers: int) -> Structure:
    attention_bias = read.flag("attention_bias", default=False)
    has_rope = _has_rope(read, layers)
    return Structure(
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=read.flag("mlp_bias", default=False),
        sliding_windows=sliding_windows(read, layers, [not rope for rope in has_rope]),
        layers_without_rope=tuple(index for index, rope in enumerate(has_rope) if not rope),
    )


def _has_rope(read: Fields, layers: int) -> list[bool]:
    """Returns which layers have RoPE: in spite of its name, a 1 in `no_rope_layers` says that one does."""
    listed = read.each_layer("no_rope_layers", layers, (0, 1))
    if listed is not None:
        return [bool(flag) for flag in listed]
    interval = read.count("no_rope_layer_interval")
    return [(index + 1) % interval != 0 for index in range(layers)]


FAMILY = Family(
    "smollm3",
    _structure,
    genai_type="smollm3",
    defaults={
        "no_rope_layer_interval": 4,
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        # transformers leaves the key out of a config.json that it writes for a tied model.
        "tie_word_embeddings": True,
    },
    gguf=Gguf("smollm3", neighbours=True),
)
