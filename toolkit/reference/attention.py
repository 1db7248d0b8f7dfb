"""Softmax attention over keys and values that stand: of a text's queries, or of one query a sequence.

T tokens, H heads, K kv heads, G = H/K, Dh head_dim; a value may be narrower than a key.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.device.arrays import device_of

Array = NDArray[np.float32]
# Queries whose scores are in memory at once: later keys than theirs are not looked at.
_QUERIES: Final = 128


def attend(
    q: Array,
    k: Array,
    v: Array,
    positions: NDArray[np.int64],
    window: int | None,
    scale: float,
    sinks: Array | None = None,
) -> Array:
    """Returns softmax attention [T, H * Dh] of queries at `positions` over keys at positions 0 … S-1.

    A query sees keys up to its own position, of which the last `window` where the layer slides. `scale` multiplies
    scores. `sinks` [H] take part in each head's softmax as one more key, of a value that is zero.
    """
    on, (T, H, Dh) = device_of(q), q.shape
    K, G = k.shape[1], H // k.shape[1]
    turned, width = on.transpose((q * scale).reshape(T, K, G, Dh), (1, 2, 0, 3)), v.shape[-1]
    keys, values = on.transpose(k, (1, 2, 0)), on.contiguous(on.transpose(v, (1, 0, 2)))
    mixed = on.empty((T, K, G, width))

    def mix(start: int) -> None:
        some = slice(start, min(start + _QUERIES, T))
        count, seen = some.stop - start, int(positions[some].max()) + 1
        scores = (turned[:, :, some].reshape(K, G * count, Dh) @ keys[:, :, :seen]).reshape(K, G, count, seen)
        distance = positions[some, None] - np.arange(seen)[None, :]
        visible = (distance >= 0) & (distance < (window or seen))
        scores += on.from_host(np.where(visible, np.float32(0), np.float32(-np.inf)))
        if sinks is not None:
            column = on.zeros((K, G, count, 1)) + sinks.reshape(K, G, 1, 1)
            scores = on.concatenate([scores, column], axis=-1)
        terms = on.softmax_terms(scores)
        over_keys = on.contiguous(terms[..., :seen]).reshape(K, G * count, seen)
        weighted = (over_keys @ values[:, :seen]).reshape(K, G, count, width)
        mixed[some] = on.transpose(weighted / terms.sum(axis=-1, keepdims=True), (2, 0, 1, 3))

    on.side_by_side(mix, range(0, T, _QUERIES))
    return mixed.reshape(T, -1)


def attend_one(
    q: Array,
    k: Array,
    v: Array,
    positions: NDArray[np.int64],
    window: int | None,
    scale: float,
    sinks: Array | None = None,
) -> Array:
    """Returns [B, H * Dh] of one query a sequence, q [B, H, Dh] at `positions`, over k and v [B, K, L, Dh]; the rest is
    as `attend` has it."""
    on, (B, _, Dh) = device_of(q), q.shape
    K, L = k.shape[1], k.shape[2]
    distance = positions[:, None] - np.arange(L)[None, :]
    visible = (distance >= 0) & (distance < (window or L + 1))
    hidden = on.from_host(np.where(visible, np.float32(0), np.float32(-np.inf)))

    def mixed(some: Array, keys: Array, values: Array, hides: Array) -> Array:
        scores = some @ on.transpose(keys, (0, 1, 3, 2))
        scores += hides[:, None, None, :]
        if sinks is not None:
            column = on.zeros((*scores.shape[:3], 1)) + sinks.reshape(1, K, -1, 1)
            scores = on.concatenate([scores, column], axis=-1)
        terms = on.softmax_terms(scores)
        weighted = on.contiguous(terms[..., :L]) @ values
        weighted /= terms.sum(axis=-1, keepdims=True)
        return weighted.reshape(weighted.shape[0], -1)

    return on.by_rows(mixed, (q * np.float32(scale)).reshape(B, K, -1, Dh), k, v, hidden)
