"""The range of every tensor that becomes uint16, seen on text through the weights as they are stored, layer by layer.

Rounded weights give other values than exact ones, and what is beyond its range is cut off.
Each token's smallest and largest value is kept, so that a range may leave out single tokens. What float16 must hold is
looked at on the way: the residual stream, and the scores of attention before their softmax.
Every finished layer is kept on disk, and an interrupted pass goes on after it.
T tokens, H heads, K kv heads, Dh head_dim.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.calibrate.activations import ActivationFile
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.linears import Linear
from toolkit.checkpoint.sublayers import Expert, Mlp
from toolkit.checkpoint.weights import Tensors
from toolkit.device.arrays import Device
from toolkit.device.fitting import ON_NUMPY, Fitting
from toolkit.errors import NonFiniteError, UnsupportedError
from toolkit.files import read_state, write_state
from toolkit.quant.ranges import ActivationRange
from toolkit.reference.decoder import Layer, batched, embed, read_layer

Floats = NDArray[np.float32]
_FILE: Final = "ranges.json"
_FLOAT16_MAX: Final = float(np.finfo(np.float16).max)


def activation_ranges(
    config: ModelConfig,
    source: Tensors,
    sequences: Sequence[Sequence[int]],
    percentile: float,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
    fitting: Fitting = ON_NUMPY,
) -> dict[str, ActivationRange]:
    """By point (`names.input_of`, `names.output_of`), the range that holds every value of `percentile` percent of the
    tokens at least; `source` has the rounded weights, `folder` holds what is finished.

    Raises NonFiniteError if an activation is NaN or infinite, UnsupportedError for values that float16 cannot hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lengths = [len(ids) for ids in sequences]
    streams = [
        ActivationFile(folder / f"hidden-{k}.f32", batched(lengths), config.hidden_size)
        for k in range(config.num_hidden_layers + 1)
    ]
    state = read_state(_Found, folder / _FILE) or _Found(0, {})
    start, found = state.layers, dict(state.ranges)
    if not 0 <= start < len(streams) or not streams[start].is_whole():
        start, found = 0, {}
        streams[0].write(embed(source, list(ids)) for ids in sequences)

    def seen_in(k: int, on: Device, tokens: int) -> dict[str, ActivationRange]:
        layer = _WatchedLayer(read_layer(config, source, k, on))
        batches = streams[k].read_by(on, batched(lengths, tokens))
        streams[k + 1].write(layer(x, together) for x, together in batches)
        return layer.ranges(percentile)

    for k in range(start, config.num_hidden_layers):
        found |= fitting.run(f"layer {k}", partial(seen_in, k))
        write_state(folder / _FILE, _Found(k + 1, found))
        streams[k].remove()
        progress(f"ranges of layer {k}")
    return found


@dataclass(frozen=True)
class _Found:
    """How many layers are done, and the ranges that were found in them by point."""

    layers: int
    ranges: dict[str, ActivationRange]


class _WatchedLayer(Layer):
    """A layer that keeps each token's smallest and largest value at each point."""

    def __init__(self, exact: Layer) -> None:
        super().__init__(exact.config, exact.anatomy, exact.tensors, exact.on)
        self._inputs = {given.name for given in exact.anatomy.inputs}
        self._seen: dict[str, list[tuple[Floats, Floats]]] = defaultdict(list)

    def __call__(self, x: Floats, lengths: Sequence[int] = ()) -> Floats:
        y = super().__call__(x, lengths)
        self._check_float16("hidden states", float(abs(y).max()))
        return y

    def product(self, linear: Linear, x: Floats) -> Floats:
        """As the exact layer's; its output is seen, and its input where it is the first to read it."""
        if linear.module in self._inputs:
            self._see(names.input_of(linear.module), x)
        y = super().product(linear, x)
        self._see(names.output_of(linear.module), y)
        return y

    def activated(self, mlp: Mlp | Expert, gate: Floats) -> Floats:
        """As the exact layer's; gate times its sigmoid is a tensor of its own in the graph."""
        silu = super().activated(mlp, gate)
        if isinstance(mlp, Mlp):  # experts have no form in uint16
            self._see(names.output_of(mlp.act_fn), silu)
        return silu

    def project(self, normed: Floats, positions: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
        """As the exact layer's; no score may be more than float16 holds."""
        q, k, v = super().project(normed, positions)
        longest_q, longest_k = (self.on.to_host(self.on.largest((x * x).sum(axis=-1), 0)) ** 0.5 for x in (q, k))
        bound = longest_q * np.repeat(longest_k, q.shape[1] // k.shape[1]) * self.config.attention_scale
        for head in np.flatnonzero(bound > _FLOAT16_MAX):
            scores = q[:, head] @ k[:, head * k.shape[1] // q.shape[1]].T
            self._check_float16("attention scores", float(abs(scores).max()) * self.config.attention_scale)
        return q, k, v

    def ranges(self, percentile: float) -> dict[str, ActivationRange]:
        """Returns by point the range that holds every value of `percentile` percent of the tokens seen."""
        found = {}
        for point, pieces in self._seen.items():
            low, high = (np.concatenate(side) for side in zip(*pieces, strict=True))
            found[point] = ActivationRange(
                min(float(np.percentile(low, 100 - percentile)), 0.0), max(float(np.percentile(high, percentile)), 0.0)
            )
        return found

    def _see(self, point: str, x: Floats) -> None:
        low, high = (self.on.to_host(side(x, 1)) for side in (self.on.smallest, self.on.largest))
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise NonFiniteError(
                f"{point} is NaN or infinite on the calibration text: the checkpoint does not compute in float32, or "
                "is damaged"
            )
        self._seen[point].append((low, high))

    def _check_float16(self, what: str, largest: float) -> None:
        if largest > _FLOAT16_MAX:
            raise UnsupportedError(
                f"{what} of layer {self.anatomy.index} reach {largest:.3g} on the calibration text, float16 holds "
                f"{_FLOAT16_MAX:.0f}: export for a target that computes in float32, such as cpu"
            )
