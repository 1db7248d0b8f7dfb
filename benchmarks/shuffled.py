"""The order that a checkpoint's channels may be put in without changing what it computes.

A checkpoint that was dequantized stands on its file's grid: each block of it has few values, so that a format of the
same blocks finds them again, and its KLD is flattered. With its channels in another order the weights are the same, but
those of a block come from many blocks and are on no grid, as a checkpoint's that was trained.

D hidden, Dh head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.anatomy import Decoder
from toolkit.checkpoint.linears import Linear
from toolkit.checkpoint.sublayers import Attention, Mlp
from toolkit.errors import UnsupportedError

_SEED: Final = 20261129


Channels = NDArray[np.intp]


@dataclass(frozen=True)
class Order:
    """Where each row and each column of a tensor comes from, None where they stay."""

    rows: Channels | None = None
    columns: Channels | None = None

    def applied(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns a tensor of the same shape in this order."""
        if self.rows is not None:
            values = values[self.rows]
        return values if self.columns is None else values[:, self.columns]


def shuffled_orders(decoder: Decoder) -> dict[str, Order]:
    """Returns the order of every tensor, by its name, always the same: new orders of the residual stream's channels, of
    each MLP's own, and, within each head, of the values'.

    Raises UnsupportedError for layers that are not attention over heads and an MLP.
    """
    source = np.random.default_rng(_SEED)
    stream = source.permutation(decoder.embedding.in_features)
    found = {tensor: Order(rows=stream) for norm in decoder.norms for tensor in norm.tensors}
    found |= _of(decoder.embedding, None, stream) | _of(decoder.head, None, stream)
    for layer in decoder.layers:
        attention, mlp = layer.attention, layer.mlp
        if not isinstance(attention, Attention) or not isinstance(mlp, Mlp) or attention.head_norms:
            raise UnsupportedError("only layers of attention without norms over heads, and of an MLP, are shuffled")
        kv_heads = attention.v_proj.out_features // decoder.head_dim
        within = np.stack([source.permutation(decoder.head_dim) for _ in range(kv_heads)])
        heads = attention.o_proj.in_features // decoder.head_dim
        for linear in attention.first:
            rows = _heads(within) if linear == attention.v_proj else None
            found |= _of(linear, rows, stream)
        found |= _of(attention.o_proj, stream, _heads(np.repeat(within, heads // kv_heads, axis=0)))
        inner = source.permutation(mlp.down_proj.in_features)
        for linear in mlp.first:
            found |= _of(linear, inner, stream)
        found |= _of(mlp.down_proj, stream, inner)
    return found


def _of(linear: Linear, rows: Channels | None, columns: Channels) -> dict[str, Order]:
    """The order of a linear's tensors; its bias goes with its rows."""
    return dict.fromkeys(linear.tensors, Order(rows)) | {linear.weight: Order(rows, columns)}


def _heads(within: Channels) -> Channels:
    """The order of all heads' channels, from each head's own, [heads, Dh]."""
    heads, Dh = within.shape
    whole: Channels = np.arange(heads)[:, None] * Dh + within
    return whole.reshape(-1)
