"""Text of a small checkpoint's own making, for one that has no text at hand: sampled at temperature 1, seeded."""

from __future__ import annotations

import numpy as np

from toolkit import names
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.weights import Tensors
from toolkit.reference.attention import Array, attend
from toolkit.reference.decoder import embed, head_logits, read_layer, rms_norm
from toolkit.reference.greedy import Resident

LENGTH = 160


def sampled_sequences(config: ModelConfig, source: Tensors, tokens: int, seed: int) -> list[list[int]]:
    """Sequences of `LENGTH` tokens, bos first, of at least `tokens` in all. Every layer is in memory."""
    resident = Resident(source)
    layers = [read_layer(config, resident, i) for i in range(config.num_hidden_layers)]
    norm = resident.read(names.weight(names.FINAL_NORM))
    generator, sequences = np.random.default_rng(seed), []
    for _ in range(-(-tokens // LENGTH)):
        ids, past = [config.bos_token_id or 0], [_Past() for _ in layers]
        while len(ids) < LENGTH:
            x, at = embed(resident, ids[-1:]), np.array([len(ids) - 1])
            for layer, cache in zip(layers, past, strict=True):
                attention = layer.anatomy.attention
                q, k, v = layer.project(layer.normed(attention, x), at)
                mixed = attend(q, *cache.grown(k, v), at, attention.window, config.attention_scale)
                x = layer.finish(x, mixed)
            logits = head_logits(config, resident, rms_norm(x, norm, config.rms_norm_eps))[0].astype(np.float64)
            ids.append(int((logits + generator.gumbel(size=logits.size)).argmax()))
        sequences.append(ids)
    return sequences


class _Past:
    """One layer's keys and values [T, K, Dh]."""

    def __init__(self) -> None:
        self._keys: list[Array] = []
        self._values: list[Array] = []

    def grown(self, k: Array, v: Array) -> tuple[Array, Array]:
        """All of them, the new ones last."""
        self._keys.append(k)
        self._values.append(v)
        return np.concatenate(self._keys), np.concatenate(self._values)
