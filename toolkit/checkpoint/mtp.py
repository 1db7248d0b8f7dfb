"""The head of a checkpoint that predicts one token more (multi-token prediction), as a checkpoint of one layer.

DeepSeek-V3 (arXiv 2412.19437, section 2.2): a layer behind the last one reads the hidden state of a position and the
embedding of the token after it, and predicts the token after that. Embedding and LM head are the model's own; the norm
before the head is `shared_head.norm`. transformers drops these tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from toolkit import names
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.misfits import layer_index
from toolkit.checkpoint.safetensors import TensorRef
from toolkit.errors import CheckpointError, UnsupportedError

_HEAD_NORM = "shared_head.norm"
_NORMS = ("enorm", "hnorm", _HEAD_NORM)
_SHARED = (names.weight(names.EMBED_TOKENS), names.weight(names.LM_HEAD))


def mtp_config(config: ModelConfig) -> ModelConfig:
    """The config of the first such head of a model. Raises UnsupportedError for a model whose config names none."""
    structure, layer = config.structure, config.num_hidden_layers
    if structure.num_nextn_predict_layers < 1:
        raise UnsupportedError(
            f"speculation mtp needs an MTP head, and config.json of this {config.model_type} has none, expected "
            "num_nextn_predict_layers of 1 or more (deepseek_v3): take speculation ngram or draft"
        )
    experts = replace(structure.experts, dense_layers=()) if structure.experts else None
    of_head = replace(structure, experts=experts, num_nextn_predict_layers=0, mtp_layer=layer)
    return replace(config, num_hidden_layers=1, structure=of_head)


def tensors_meant(tensors: Mapping[str, TensorRef], config: ModelConfig, folder: Path) -> dict[str, TensorRef]:
    """The tensors without those that predict further tokens; of such a head its own, under a one-layer model's
    names. Raises CheckpointError for a head that is not there."""
    own = config.structure.mtp_layer
    if own is None:
        last = config.num_hidden_layers + config.structure.num_nextn_predict_layers
        beyond = range(config.num_hidden_layers, last)
        return {name: ref for name, ref in tensors.items() if layer_index(name) not in beyond}
    found = {name: ref for name, ref in tensors.items() if name in _SHARED}
    prefix = names.layer_module(own, "")
    if missing := [name for norm in _NORMS if (name := names.weight(prefix + norm)) not in tensors]:
        raise CheckpointError(
            f"{folder} has no {missing[0]}, which its config.json promises by num_nextn_predict_layers: transformers "
            "leaves an MTP head out when it saves a model; name the original, or leave speculation out"
        )
    norm = names.weight(f"{prefix}{_HEAD_NORM}")
    # Its copies of the embedding and the LM head are the model's.
    copies = (f"{prefix}embed_tokens.", f"{prefix}shared_head.head.")
    for name, ref in tensors.items():
        if name.startswith(prefix) and not name.startswith(copies):
            new = names.weight(names.FINAL_NORM) if name == norm else names.layer_module(0, name.removeprefix(prefix))
            found[new] = replace(ref, name=new)
    return found
