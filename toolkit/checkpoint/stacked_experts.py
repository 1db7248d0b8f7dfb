"""The experts of a layer that a checkpoint has in one tensor, as a matrix and a bias for each.

E experts, D hidden, I an expert's width. gate_up_proj [E, D, 2 I] has the columns of gate and up by turns, down_proj is
[E, I, D]: input features first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.scan import Rows
from toolkit.checkpoint.weights import WeightSource
from toolkit.names import bias, weight

Floats = NDArray[np.float32]
# Experts that are turned while their rows stream by, on several threads.
_KEPT: Final = 8


@dataclass(frozen=True)
class _Part:
    """Which expert of a stacked tensor a tensor is, which of how many that have their columns by turns, and how many
    rows it has."""

    stack: str
    expert: int
    turn: int
    turns: int
    rows: int


def unstacked(source: WeightSource, config: ModelConfig) -> WeightSource:
    """The source with a tensor for each linear of each expert; itself where a checkpoint has them so."""
    experts = config.structure.experts
    return StackedExperts(source, config) if experts and experts.stacked else source


class StackedExperts:
    """A `WeightSource` over another. A stacked tensor is read one expert at a time."""

    def __init__(self, source: WeightSource, config: ModelConfig) -> None:
        self._source = source
        self._parts: dict[str, _Part] = {}
        self._of_stack: dict[str, list[list[str]]] = {}
        for moe in decoder_of(config).moes:
            for module, by_expert in moe.stacks().items():
                for stack, tensor_of in ((module, weight), (f"{module}_bias", bias)):
                    self._of_stack[stack] = [[tensor_of(one.module) for one in linears] for linears in by_expert]
                    for k, linears in enumerate(by_expert):
                        for turn, one in enumerate(linears):
                            part = _Part(stack, k, turn, len(linears), one.out_features)
                            self._parts[tensor_of(one.module)] = part
        self.identity, self.digests, self.bytes_read = source.identity, source.digests, source.bytes_read
        self._turned: OrderedDict[tuple[str, int], Floats] = OrderedDict()
        self._lock = Lock()

    def names(self) -> list[str]:
        """Lists every tensor's name, experts' where the tensor stands that has them."""
        return [
            name
            for stored in self._source.names()
            for parts in self._of_stack.get(stored, [[stored]])
            for name in parts
        ]

    def read(self, name: str) -> Floats:
        """Reads a whole tensor in float32, an expert's cut out of its stack."""
        part = self._parts.get(name)
        return self._source.read(name) if part is None else self._part(part)

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows [start, stop) of a tensor in float32."""
        part = self._parts.get(name)
        return self._source.read_rows(name, start, stop) if part is None else self._part(part)[start:stop]

    def scan(self, chunk_bytes: int) -> Iterator[Rows]:
        """As the source's; experts' tensors come whole and without their bytes, since they are turned when decoded."""
        for rows in self._source.scan(chunk_bytes):
            if rows.name not in self._of_stack:
                yield rows
                continue
            rows.release()
            for parts in self._of_stack[rows.name][rows.start : rows.stop]:
                for name in parts:
                    yield Rows(name, 0, self._parts[name].rows, None)

    def decode(self, rows: Rows, start: int, stop: int) -> Floats:
        """Some rows of those that `scan` yielded."""
        if rows.name in self._parts:
            return self.read_rows(rows.name, start, stop)
        return self._source.decode(rows, start, stop)

    def _part(self, part: _Part) -> Floats:
        """One matrix [rows, in_features], or one bias [rows]."""
        return np.ascontiguousarray(self._expert(part.stack, part.expert)[part.turn :: part.turns])

    def _expert(self, stack: str, expert: int) -> Floats:
        """One expert of a stacked tensor, output features first; the last that were asked for are kept."""
        key = stack, expert
        with self._lock:
            if key in self._turned:
                self._turned.move_to_end(key)
                return self._turned[key]
        read = self._source.read_rows(stack, expert, expert + 1)[0]
        turned = np.ascontiguousarray(read.T)
        with self._lock:
            self._turned[key] = turned
            while len(self._turned) > _KEPT:
                self._turned.popitem(last=False)
        return turned
