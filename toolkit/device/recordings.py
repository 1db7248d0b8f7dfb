"""Operations recorded once and launched as one: CUDA graphs, for loops of steps so small that launching them costs more
than they do (https://docs.pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

# What a layer's matrices need; each recording keeps its arrays and what its steps make.
_MOST: Final = 16


@dataclass(frozen=True)
class _Recording:
    """A graph, the arrays that it reads and those that it writes."""

    graph: torch.cuda.CUDAGraph
    given: tuple[torch.Tensor, ...]
    made: tuple[torch.Tensor, ...]


class Recordings:
    """What was recorded, by function and shapes, those used last at the end."""

    def __init__(self) -> None:
        self._recordings: dict[object, _Recording | None] = {}
        self._refused = False

    def made(self, function: Callable[..., tuple[Any, ...]], arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns what a function makes of arrays. The first time it is called as it is: what it loads and compiles is
        no part of a recording."""
        key = (function, tuple(tuple(x.shape) for x in arrays))
        if self._refused or key not in self._recordings:
            self._keep(key, None)
            return function(*arrays)
        recording = self._recordings.pop(key)
        if recording is None:
            try:
                recording = _record(function, arrays)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                # A driver or a build of torch that records nothing: slower, and the same.
                self._refused = True
                return function(*arrays)
        self._keep(key, recording)
        for to, x in zip(recording.given, arrays, strict=True):
            to.copy_(x)
        recording.graph.replay()
        return recording.made

    def forget(self) -> None:
        """Gives up every recording and its memory."""
        self._recordings.clear()

    def _keep(self, key: object, recording: _Recording | None) -> None:
        self._recordings[key] = recording
        while len(self._recordings) > _MOST:
            del self._recordings[next(iter(self._recordings))]


def _record(function: Callable[..., tuple[Any, ...]], arrays: tuple[Any, ...]) -> _Recording:
    given, graph = tuple(x.clone() for x in arrays), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = function(*given)
    return _Recording(graph, given, made)
