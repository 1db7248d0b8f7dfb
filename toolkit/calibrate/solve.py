"""The second pass: GPTQ, layer by layer, each matrix against the input that reaches it through those before.

Two streams run through the layers, one exact and one rounded as far as matrices are solved; what a matrix reads in both
gives its second moment and its corrected target (quant/gptq.py). Every finished layer is kept, and an interrupted
pass goes on after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.calibrate.activations import ActivationFile, Activations, HeldActivations
from toolkit.calibrate.exact import ExactInputs
from toolkit.calibrate.expert_pieces import rounded_elsewhere
from toolkit.calibrate.input_solver import Fallback, InputSolver, Problem
from toolkit.calibrate.layer_matrices import LayerMatrices, RowsWriter
from toolkit.calibrate.sides import ComputedSide, KeptSide, Side
from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.sublayers import Moe
from toolkit.checkpoint.weights import Tensors
from toolkit.device.arrays import NUMPY, Device
from toolkit.device.fitting import ON_NUMPY, Fitting, Pool
from toolkit.files import read_state, write_state
from toolkit.quant.blockwise import dequantize_blocks, quantize_blocks
from toolkit.reference.decoder import batched, embed, head_step, read_layer, rms_norm
from toolkit.reference.shared import share_layer

Floats = NDArray[np.float32]
_PROGRESS_FILE: Final = "progress.json"
# Floats inside a layer that stay in memory where workers make them: the process that exports has little else there.
_HELD: Final = 1 << 26
# The two streams through the layers.
_EXACT: Final = "exact"
_ROUNDED: Final = "rounded"


@dataclass(frozen=True)
class _Solved:
    """How many layers are solved, and what fell back in them."""

    layers: int
    fallbacks: tuple[Fallback, ...]


class Writer(RowsWriter, Protocol):
    """Takes rows as they are solved, and keeps them; `resumed` says whether those of an earlier run are there."""

    resumed: bool

    def commit(self) -> None:
        """Everything written so far is on disk and stays when this returns."""
        ...


class Solver:
    """Solves a model's matrices on a device, a layer at a time and the head last; `folder` holds what is finished."""

    def __init__(
        self,
        config: ModelConfig,
        sequences: Sequence[Sequence[int]],
        writer: Writer,
        folder: Path,
        fitting: Fitting = ON_NUMPY,
        kept: ExactInputs | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._fitting, self._kept = fitting, kept
        self._config, self._sequences, self._writer, self._folder = config, sequences, writer, folder
        self._lengths = [len(ids) for ids in sequences]
        state = read_state(_Solved, folder / _PROGRESS_FILE) or _Solved(0, ())
        whole = writer.resumed and all(stream.is_whole() for stream in self._streams(state.layers).values())
        self.layers, self._fallbacks = (state.layers, list(state.fallbacks)) if whole else (0, [])
        self._begun = whole

    def layer(self, source: Tensors, problem: Problem, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Writes the next layer's matrices. `source` holds the weights as they are to be stored, folded if they are.
        `meanwhile` is called when most of a pool would wait: while the factor of the widest input is made."""
        if not self._begun:
            embedding = {_EXACT: lambda ids: embed(source, ids), _ROUNDED: _rounded_embedding(source, problem)}
            for kind, stream in self._streams(0).items():
                stream.write(embedding[kind](list(ids)) for ids in self._sequences)
            self._begun = True
        k = self.layers
        inputs = [given for given in decoder_of(self._config).layers[k].inputs if not given.routed]

        def solved(on: Device, tokens: int) -> _LayerPass:
            lengths = batched(self._lengths, tokens)
            pool = self._fitting.pool
            layer = _LayerPass(self._config, source, k, problem, self._writer, self._folder, lengths, on, pool)
            before, after = (self._read_by(n, on, lengths) for n in (k, k + 1))
            rounded = layer.side(_ROUNDED, before[_ROUNDED], after[_ROUNDED])
            if kept := self._kept_side(problem, on, lengths):
                layer.run(kept, rounded, meanwhile, forgets=True)
            else:
                layer.run(layer.side(_EXACT, before[_EXACT], after[_EXACT]), rounded, meanwhile)
            return layer

        layer = self._fitting.run(f"layer {k}", solved)
        self._fallbacks += layer.fallbacks
        self._writer.commit()
        # Only now: a layer that the journal does not name is solved again.
        write_state(self._folder / _PROGRESS_FILE, _Solved(k + 1, tuple(self._fallbacks)))
        layer.finish()
        for stream in self._streams(k).values():
            stream.remove()
        if self._kept:
            self._kept.forget(inputs)
        self.layers = k + 1

    def head(self, source: Tensors, problem: Problem) -> list[Fallback]:
        """Writes the head; returns every matrix that was rounded otherwise."""
        given = decoder_of(self._config).head_input

        def solved(on: Device, tokens: int) -> list[Fallback]:
            lengths = batched(self._lengths, tokens)
            streams, kept = self._read_by(self._config.num_hidden_layers, on, lengths), None
            if side := self._kept_side(problem, on, lengths):
                kept = side.values(given)
            return _solve_head(self._config, source, problem, self._writer, streams, kept, on, self._fitting.pool)

        if not problem.specs[given.linears[0].weight].rounded_by.solves:
            return self._fallbacks
        fallbacks = self._fallbacks + self._fitting.run("the LM head", solved)
        self._writer.commit()
        return fallbacks

    def _kept_side(self, problem: Problem, on: Device, lengths: Sequence[tuple[int, ...]]) -> KeptSide | None:
        return KeptSide(self._kept, problem.scales, on, lengths) if self._kept else None

    def _streams(self, k: int) -> dict[str, ActivationFile]:
        """The streams that are computed here, before layer `k`."""
        return {
            kind: ActivationFile(self._folder / f"{kind}-{k}.f32", batched(self._lengths), self._config.hidden_size)
            for kind in ((_ROUNDED,) if self._kept else (_EXACT, _ROUNDED))
        }

    def _read_by(self, k: int, on: Device, lengths: Sequence[tuple[int, ...]]) -> dict[str, ActivationFile]:
        return {kind: stream.read_by(on, lengths) for kind, stream in self._streams(k).items()}


def solve(
    config: ModelConfig,
    source: Tensors,
    sequences: Sequence[Sequence[int]],
    problem: Problem,
    writer: Writer,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
    fitting: Fitting = ON_NUMPY,
) -> list[Fallback]:
    """Writes every matrix whose algorithm solves; returns those that were rounded otherwise.

    `source` holds the weights as they are to be stored, folded if they are.
    """
    solver = Solver(config, sequences, writer, folder, fitting)
    while solver.layers < config.num_hidden_layers:
        solver.layer(source, problem)
        progress(f"solved layer {solver.layers - 1}")
    fallbacks = solver.head(source, problem)
    progress("solved head")
    return fallbacks


def _rounded_embedding(source: Tensors, problem: Problem) -> Callable[[list[int]], Floats]:
    """What looks up rows as they are stored; of a table that is solved last, as the head, about so."""
    name = names.weight(names.EMBED_TOKENS)
    spec = problem.specs[name]

    def look_up(ids: list[int]) -> Floats:
        rows = embed(source, ids)
        return dequantize_blocks(quantize_blocks(rows, spec, problem.importance.get(name)), spec, rows.shape[1])

    return look_up


class _LayerPass:
    """One layer in both streams; matrices of the rounded one are replaced as they are solved."""

    def __init__(
        self,
        config: ModelConfig,
        source: Tensors,
        k: int,
        problem: Problem,
        writer: Writer,
        folder: Path,
        lengths: Sequence[tuple[int, ...]],
        on: Device,
        pool: Pool | None,
    ) -> None:
        self._folder, self._lengths = folder, lengths
        self._pool = pool
        self._shared = share_layer(config, source, k) if pool else None
        self._exact = read_layer(config, source, k, on)
        self._matrices = LayerMatrices(self._exact, source, problem, writer, pool, self._shared)
        self._rounded, self.fallbacks = self._matrices.rounded, self._matrices.fallbacks
        if pool and self._shared and isinstance(self._exact.anatomy.mlp, Moe):
            self._rounded.elsewhere = rounded_elsewhere(pool, self._shared, problem, writer, self.fallbacks)
        self._spills: list[Activations] = []

    def side(self, kind: str, before: ActivationFile, after: ActivationFile) -> Side:
        """One stream through the layer, from file to file."""

        def spill(name: str, width: int) -> Activations:
            on, path = self._exact.on, self._folder / f"{name}.{kind}.f32"
            held = on.rounds_columns or (self._pool and width * sum(map(sum, self._lengths)) <= _HELD)
            self._spills.append(
                HeldActivations(self._lengths) if held else ActivationFile(path, self._lengths, width, on)
            )
            return self._spills[-1]

        layer, solved = (self._exact, {}) if kind == _EXACT else (self._rounded, self._matrices.packed)
        return ComputedSide(layer, before, after, spill, self._pool, self._shared, solved)

    def run(self, exact: Side, rounded: Side, meanwhile: Callable[[], None], forgets: bool = False) -> None:
        """Solves the layer's matrices in the order they are used, `meanwhile` called while the factor of the widest
        input is made, and takes both streams through it. Where nothing is
        computed with the exact ones any more, each `forgets` itself once it is solved: both together are a layer's
        weights once, and not twice."""
        inputs = [given for given in self._exact.anatomy.inputs if not given.routed]
        widest = max(inputs, key=lambda given: given.width, default=None)
        for half in self._exact.anatomy.sublayers:
            for given in half.inputs:
                if given.routed:
                    self._rounded.solved |= {linear.module: given for linear in given.linears}
                else:
                    pairs = zip(exact.reads(half, given), rounded.reads(half, given), strict=True)
                    others = meanwhile if given == widest else (lambda: None)
                    self._matrices.solve(given, pairs, sum(map(sum, self._lengths)), others)
                    for linear in given.linears if forgets else ():
                        self._exact.tensors.pop(linear.weight)
            exact.step(half)
            rounded.step(half, self._matrices.by_routed)

    def finish(self) -> None:
        """Forgets the activations inside this layer."""
        for spill in self._spills:
            spill.remove()


def _solve_head(
    config: ModelConfig,
    source: Tensors,
    problem: Problem,
    writer: Writer,
    streams: Mapping[str, ActivationFile],
    kept: Iterator[Floats] | None,
    on: Device,
    pool: Pool | None,
) -> list[Fallback]:
    """Solves the head for what `streams` end with; what it reads in the exact one may be `kept`."""
    decoder = decoder_of(config)
    given, tensor = decoder.head_input, decoder.head.weight
    norm = on.from_host(source.read(decoder.norm.weight))
    solver = InputSolver(given, problem, on, pool, None)

    def arrived(kind: str) -> Iterator[Floats]:
        return (rms_norm(x, norm, config.stream_eps) for x, _ in streams[kind])

    solver.gather(zip(kept or arrived(_EXACT), arrived(_ROUNDED), strict=True), streams[_ROUNDED].tokens)
    step = head_step(config)
    starts = range(0, config.vocab_size, step)
    made = solver.side_by_side(source, {tensor: [*starts[1:], config.vocab_size]})
    for k, start in enumerate(starts):
        weight = source.read_rows(tensor, start, min(config.vocab_size, start + step))
        blocks = made[k] if made else solver.rows(tensor, on.from_host(weight)).blocks
        writer.write(tensor, start, NUMPY.square_sum(weight), blocks)
    return solver.fallbacks
