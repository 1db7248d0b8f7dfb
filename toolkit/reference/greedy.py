"""Greedy answers of the reference, many prompts side by side, with a KV cache: the checkpoint's own task accuracy.

Every layer is resident on the device, so this is for models that fit into its memory as float32.
B live sequences, T tokens, D hidden, H heads, K kv heads, G = H/K, Dh head_dim, L longest length.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.sublayers import LinearAttention
from toolkit.checkpoint.weights import Tensors
from toolkit.device.arrays import NUMPY, Device
from toolkit.reference.attention import Array, attend, attend_one
from toolkit.reference.decoder import Layer, embed, head_rows, read_layer, rms_norm
from toolkit.reference.delta_rule import DeltaState


class Resident:
    """`Tensors` that remembers every tensor it has read."""

    def __init__(self, source: Tensors) -> None:
        self._source = source
        self._tensors: dict[str, Array] = {}

    def __reduce__(self) -> tuple[type[Resident], tuple[Tensors]]:
        """What another process is sent: the source, nothing of what is remembered here."""
        return Resident, (self._source,)

    def names(self) -> list[str]:
        """Lists the names that the source has."""
        return self._source.names()

    def read(self, name: str) -> Array:
        """Reads a whole tensor, from the source the first time."""
        if name not in self._tensors:
            self._tensors[name] = self._source.read(name)
        return self._tensors[name]

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Reads rows [start, stop) of a tensor that is remembered."""
        return self.read(name)[start:stop]


def greedy_continuations(
    config: ModelConfig,
    source: Tensors,
    prompts: list[list[int]],
    new_tokens: int,
    stop_ids: set[int],
    on: Device = NUMPY,
) -> list[list[int]]:
    """What each prompt is continued with, ended by (and including) a stop id or after `new_tokens`."""
    resident = source if isinstance(source, Resident) else Resident(source)
    decoder = _Decoder(config, resident, prompts, new_tokens, on)
    made: list[list[int]] = [[] for _ in prompts]
    tokens = decoder.prefill(prompts)
    for count in range(1, new_tokens + 1):
        for sequence, token in zip(decoder.live, tokens, strict=True):
            made[sequence].append(int(token))
        going = ~np.isin(tokens, list(stop_ids))
        if count == new_tokens or not going.any():
            break
        tokens = decoder.step(tokens[decoder.keep(going)])
    return made


class _Decoder:
    """The layers and the keys and values of sequences that go on, [B, K, L, Dh] a layer, in the order of `live`."""

    def __init__(
        self, config: ModelConfig, source: Resident, prompts: list[list[int]], new_tokens: int, on: Device
    ) -> None:
        self.config, self.source, self.on = config, source, on
        self.layers = [read_layer(config, source, i, on) for i in range(config.num_hidden_layers)]
        self.norm = on.from_host(source.read(names.weight(names.FINAL_NORM)))
        self.head = [on.from_host(rows) for rows in head_rows(config, source)]
        self.lengths = np.array([len(prompt) for prompt in prompts])
        self.live = np.arange(len(prompts))
        shape = (len(prompts), config.num_key_value_heads, int(self.lengths.max()) + new_tokens)
        self.keys = [on.zeros((*shape, config.head_dim)) for _ in self.layers]
        self.values = [on.zeros((*shape, config.v_head_dim)) for _ in self.layers]
        self.states: dict[tuple[int, int], DeltaState] = {}

    def prefill(self, prompts: list[list[int]]) -> NDArray[np.int64]:
        """Fills the caches; returns each prompt's next token [B]."""
        last = []
        for sequence, prompt in enumerate(prompts):
            x, positions = self.on.from_host(embed(self.source, prompt)), np.arange(len(prompt))
            for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
                attention = layer.anatomy.attention
                normed = layer.normed(attention, x)
                if isinstance(attention, LinearAttention):
                    x = layer.finish(x, layer.recurrent(attention, normed, self._state(layer, sequence)))
                    continue
                q, k, v = layer.project(normed, positions)
                keys[sequence, :, : len(prompt)] = self.on.transpose(k, (1, 0, 2))
                values[sequence, :, : len(prompt)] = self.on.transpose(v, (1, 0, 2))
                scale = self.config.attention_scale
                mixed = attend(q, k, v, positions, attention.window, scale, layer.sinks)
                x = layer.finish(x, layer.gated(normed, mixed))
            last.append(x[-1:])
        return self._next(self.on.concatenate(last))

    def keep(self, going: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Forgets the sequences that do not go on; returns the places of the others in the order that they stand in
        from now on: the last ones take the places of those that are gone, so that what stands is read without a
        copy."""
        count = int(going.sum())
        gone, last = np.flatnonzero(~going[:count]), np.flatnonzero(going[count:]) + count
        kept = np.arange(count)
        kept[gone] = last
        to, taken = self.on.index(gone), self.on.index(last)
        for cached in (*self.keys, *self.values) if gone.size else ():
            cached[to] = cached[taken]
        self.lengths, self.live = self.lengths[kept], self.live[kept]
        return kept

    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """One token for each sequence that goes on; returns the tokens after them [B]."""
        x = self.on.from_host(self.source.read(names.weight(names.EMBED_TOKENS))[tokens])
        positions, B = self.lengths, tokens.size
        longest, rows, last = int(positions.max()) + 1, self.on.index(np.arange(B)), self.on.index(positions)
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            attention = layer.anatomy.attention
            normed = layer.normed(attention, x)
            if isinstance(attention, LinearAttention):
                each = [
                    layer.recurrent(attention, normed[k : k + 1], self._state(layer, int(sequence)))
                    for k, sequence in enumerate(self.live)
                ]
                x = layer.finish(x, self.on.concatenate(each))
                continue
            q, k, v = layer.project(normed, positions)
            keys[rows, :, last], values[rows, :, last] = k, v
            seen = keys[:B, :, :longest], values[:B, :, :longest]
            scale = self.config.attention_scale
            mixed = attend_one(q, *seen, positions, attention.window, scale, layer.sinks)
            x = layer.finish(x, layer.gated(normed, mixed))
        self.lengths += 1
        return self._next(x)

    def _state(self, layer: Layer, sequence: int) -> DeltaState:
        """What a layer of linear attention remembers of a sequence, nothing at first."""
        attention, key = layer.anatomy.attention, (layer.anatomy.index, sequence)
        assert isinstance(attention, LinearAttention)
        return self.states.setdefault(key, DeltaState.empty(attention.shape))

    def _next(self, x: Array) -> NDArray[np.int64]:
        x = rms_norm(x, self.norm, self.config.stream_eps)
        logits = [self.on.to_host(self.on.product(x, rows.T)) for rows in self.head]
        return np.asarray(np.concatenate(logits, axis=1).argmax(axis=-1))
