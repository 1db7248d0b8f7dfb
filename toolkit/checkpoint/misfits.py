"""What is said of tensors that are not those a config calls for."""

from __future__ import annotations

import re
from typing import Final

from toolkit import names
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.safetensors import TensorRef

_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.")


def layer_index(name: str) -> int | None:
    """Which layer a tensor is of, None outside of the layers."""
    layer = _LAYER.match(name)
    return int(layer[1]) if layer else None


def is_beyond(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is of a layer that the config does not have."""
    layer = layer_index(name)
    return layer is not None and layer >= config.num_hidden_layers


def not_called_for(extra: list[str], config: ModelConfig) -> str:
    """What there is beside what the config calls for, and what that may mean."""
    beyond = [name for name in extra if is_beyond(name, config)]
    first = (beyond or extra)[0]
    said = f"{len(extra)} tensors its config does not call for, such as {first[-100:]}: "
    if beyond:
        return f"{said}num_hidden_layers is {config.num_hidden_layers} in its config.json, and there are more"
    if all(name.endswith(".bias") for name in extra):
        return f"{said}its config.json is another model's, or lacks attention_bias or mlp_bias"
    return f"{said}its config.json is another model's"


def other_shape(ref: TensorRef, shape: tuple[int, ...]) -> str:
    """What to say of a tensor that has another shape than the config calls for."""
    tables = (names.weight(names.EMBED_TOKENS), names.weight(names.LM_HEAD))
    if ref.name in tables and len(ref.shape) == 2 and ref.shape[1:] == shape[1:]:
        return (
            f"{ref.name} has {ref.shape[0]} rows, and vocab_size is {shape[0]} in config.json: if tokens were added or "
            f"taken away, set vocab_size to {ref.shape[0]}"
        )
    return f"{ref.name} is {ref.dtype} {list(ref.shape)}, expected {list(shape)}: its config.json is another model's"
