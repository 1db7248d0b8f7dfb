"""What a graph takes of the text so far and gives back: keys and values, latents, or the states of linear attention."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from toolkit import names
from toolkit.checkpoint.anatomy import DecoderLayer
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.sublayers import LinearAttention
from toolkit.graph.builder import GraphBuilder, declare, value
from toolkit.graph.latent_cache import cache_row


@dataclass(frozen=True)
class CacheShape:
    """The KV cache as graph inputs and outputs: batch, past and total length, each a number or a name, for these
    layers, all if None."""

    batch: int | str
    past: int | str
    total: int | str
    layers: range | None = None


def taken_by(build: GraphBuilder, config: ModelConfig, cache: CacheShape, layer: DecoderLayer) -> list[ir.Value]:
    """Returns what a layer takes: key and value, one of another two where latents are kept, or the convolution's last
    inputs and the state of linear attention, whose shapes no length changes."""
    if isinstance(attention := layer.attention, LinearAttention):
        conv, recurrent = names.past_conv(layer.index), names.past_recurrent(layer.index)
        return [
            value(conv, build.dtype, (cache.batch, *attention.shape.conv_state)),
            value(recurrent, build.dtype, (cache.batch, *attention.shape.recurrent_state)),
        ]
    if build.form.latent_cache:
        return [latent_taken(build, config, cache, layer.index)]
    return [_row(build, config, cache, name(layer.index)) for name in (names.past_key, names.past_value)]


def latent_taken(build: GraphBuilder, config: ModelConfig, cache: CacheShape, index: int) -> ir.Value:
    """Returns the latents that a layer takes: every second layer's are in a value's place."""
    return _row(build, config, cache, (names.past_key, names.past_value)[index % 2](index // 2))


def given_back(
    build: GraphBuilder, config: ModelConfig, cache: CacheShape, made: ir.Value, taken: ir.Value
) -> ir.Value:
    """Declares what a run gives back for what it took, and returns it."""
    name = str(taken.name)
    if names.is_state(name):
        assert taken.shape is not None
        shape = [cache.batch, *(dim for dim in taken.shape[1:] if isinstance(dim, int))]
        return declare(made, names.present_of(name), build.dtype, shape)
    heads, width = cache_row(build.form, config)
    return declare(made, names.present_of(name), build.dtype, (cache.batch, heads, cache.total, width))


def _row(build: GraphBuilder, config: ModelConfig, cache: CacheShape, name: str) -> ir.Value:
    heads, width = cache_row(build.form, config)
    return value(name, build.dtype, (cache.batch, heads, cache.past, width))
