"""A layer of a checkpoint for other processes: what they are sent is where its tensors lie, and each reads for itself
those that it needs."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.weights import Tensors
from toolkit.device.arrays import NUMPY
from toolkit.names import is_expert
from toolkit.reference.decoder import Layer, LayerTensors

Array = NDArray[np.float32]
# What this process read last, by the key of a layer: work comes layer by layer, of one that is solved and of the next,
# which is surveyed meanwhile.
_LAYERS: Final = 2
_READ: Final[dict[str, dict[str, Array]]] = {}


@dataclass(frozen=True)
class SharedLayer:
    """A layer by its place in the checkpoint that `source` reads, with the names of its tensors but experts'.
    What a process read of it is kept until the process is asked for two layers of other `key`s."""

    key: str
    config: ModelConfig
    source: Tensors
    index: int
    tensors: tuple[str, ...]

    def opened(self, without: Collection[str] = ()) -> Layer:
        """Returns the layer with its tensors, but for those that are named."""
        anatomy = decoder_of(self.config).layers[self.index]
        return Layer(self.config, anatomy, {name: self.read(name) for name in self.tensors if name not in without})

    def experts(self) -> Layer:
        """Returns the layer for who computes with its experts: their tensors are read when they are used, and not
        kept."""
        return Layer(self.config, decoder_of(self.config).layers[self.index], LayerTensors(self.source, NUMPY, ()))

    def read(self, name: str) -> Array:
        """Returns a tensor of the layer as float32."""
        return self.kept(name, lambda: self.source.read(name))

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Returns rows of a tensor, of one that was read whole where it was."""
        whole = _READ.get(self.key, {}).get(name)
        return self.source.read_rows(name, start, stop) if whole is None else whole[start:stop]

    def kept(self, what: str, make: Callable[[], Array]) -> Array:
        """Returns what `make` makes, the first time that this process asks for it."""
        while self.key not in _READ and len(_READ) >= _LAYERS:
            _READ.pop(next(iter(_READ)), None)
        found = _READ.setdefault(self.key, {})
        if what not in found:
            found[what] = make()
        return found[what]


def share_layer(config: ModelConfig, source: Tensors, index: int) -> SharedLayer:
    """Returns a layer for other processes, with a key that no other one has."""
    prefix = decoder_of(config).layers[index].prefix
    names = tuple(name for name in source.names() if name.startswith(prefix) and not is_expert(name))
    return SharedLayer(uuid.uuid4().hex, config, source, index, names)
