"""A checkpoint and variants of its weights through the same forward pass, side by side: each weight is read once for
all of them.

T positions, D hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np

from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.remembered import Remembered
from toolkit.checkpoint.sublayers import Moe
from toolkit.checkpoint.weights import Tensors
from toolkit.device.arrays import Device
from toolkit.device.fitting import ON_NUMPY, Fitting, Pool
from toolkit.reference.decoder import Array, add_logits, batched, embed, head_rows, read_layer, rms_norm, through_layer
from toolkit.reference.shared import SharedLayer, share_layer

# What a variant makes of the checkpoint's tensors; the checkpoint itself is `exact`.
Variant = Callable[[Tensors], Tensors]


def exact(source: Tensors) -> Tensors:
    """The checkpoint's tensors as they are."""
    return source


@dataclass(frozen=True)
class Forward:
    """A variant and the sequences of token ids that go through it."""

    variant: Variant
    sequences: Sequence[list[int]]


def hidden_beside(
    config: ModelConfig,
    source: Tensors,
    runs: Sequence[Forward],
    progress: Callable[[str], None] = lambda _: None,
    fitting: Fitting = ON_NUMPY,
) -> list[list[Array]]:
    """The final norm's output [T, D] of each sequence of each run, one layer of each variant in memory at a time.

    `progress` is called with the name of each finished layer.
    """
    read = Remembered(source)
    variants = [run.variant(read) for run in runs]
    hidden = [[embed(tensors, ids) for ids in run.sequences] for tensors, run in zip(variants, runs, strict=True)]
    read.forget()
    for layer_index in range(config.num_hidden_layers):
        for k, tensors in enumerate(variants):
            further = partial(_further, config, tensors, layer_index, hidden[k], fitting.pool)
            hidden[k] = fitting.run(f"layer {layer_index}", further)
        read.forget()
        progress(f"layer {layer_index}")
    norm = decoder_of(config).norm.weight
    return [
        [rms_norm(x, tensors.read(norm), config.stream_eps) for x in states]
        for tensors, states in zip(variants, hidden, strict=True)
    ]


def logits_beside(
    config: ModelConfig,
    source: Tensors,
    variants: Sequence[Variant],
    hidden: Sequence[Array],
    fitting: Fitting = ON_NUMPY,
) -> list[Array]:
    """[T, V] of each variant's hidden states [T, D], the head going by once for all, some rows at a time."""
    return fitting.run("the LM head", lambda on, _: _logits(config, source, variants, hidden, on))


def _further(
    config: ModelConfig,
    tensors: Tensors,
    layer_index: int,
    hidden: list[Array],
    pool: Pool | None,
    on: Device,
    tokens: int,
) -> list[Array]:
    """Hidden states behind a layer, of those before it. Experts are read one at a time, here."""
    if pool is None or isinstance(decoder_of(config).layers[layer_index].mlp, Moe):
        return through_layer(read_layer(config, tensors, layer_index, on), hidden, tokens)
    lengths = batched([x.shape[0] for x in hidden], tokens)
    ends = list(accumulate(map(len, lengths)))
    pieces = [hidden[end - len(group) : end] for group, end in zip(lengths, ends, strict=True)]
    return [x for made in pool.map(_through_shared, share_layer(config, tensors, layer_index), pieces) for x in made]


def _through_shared(shared: SharedLayer, pieces: list[Array]) -> list[Array]:
    """Sequences that go through a layer together, wherever that is."""
    return through_layer(shared.opened(), pieces, sum(x.shape[0] for x in pieces))


def _logits(
    config: ModelConfig, source: Tensors, variants: Sequence[Variant], hidden: Sequence[Array], on: Device
) -> list[Array]:
    read = Remembered(source)
    made = [np.empty((states.shape[0], config.vocab_size), np.float32) for states in hidden]
    start, moved = 0, [on.from_host(states) for states in hidden]
    for blocks in zip(*(head_rows(config, variant(read)) for variant in variants), strict=True):
        for logits, states, rows in zip(made, moved, blocks, strict=True):
            add_logits(logits, start, states, rows, on)
        start += blocks[0].shape[0]
        read.forget()
    return made
