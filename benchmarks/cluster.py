"""What calibrating takes on a cluster, on paper.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m benchmarks.cluster [MODEL …] [--workers 8,64] [--threads 8]

Of each model's true shape the work of a layer is counted as a forecast counts it, split into the pieces that workers
are given (calibrate/pieces.py, calibrate/side_by_side.py, calibrate/expert_pieces.py). Seconds are those divided by
what a thread of this machine does in a second: a worker that has no piece waits, and so does everybody for the last
piece. Bytes are those that the exporting process sends and is sent, and those that workers read of the checkpoint
through a shared path. What several workers are sent goes out as a tree, as Dask's scatter does it: it costs a copy,
and one more for each doubling. Nothing overlaps here: a bound from above for that, and from below for stragglers and
for what loops of Python take.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolkit.calibrate.side_by_side import ROWS
from toolkit.checkpoint.anatomy import DecoderLayer, decoder_of
from toolkit.checkpoint.config import ModelConfig, read_config
from toolkit.checkpoint.linears import LinearInput
from toolkit.checkpoint.sublayers import Moe
from toolkit.checkpoint.weights import parameter_count
from toolkit.device.fitting import TOGETHER
from toolkit.pipeline.calibration_work import PASSES_TO_SEARCH, PASSES_TO_SOLVE, forward_work
from toolkit.pipeline.text import LONGEST
from toolkit.pipeline.work import MachineSpeed, Work, measure_speed
from toolkit.quality import QUALITIES

ROOT: Final = Path(__file__).resolve().parent.parent
_FLOAT: Final = 4
# What a weight takes in the checkpoint, and in blocks of 32 with their scales.
_STORED: Final = 2
_BLOCKS: Final = 0.6
_GIGA: Final = 1e9


@dataclass(frozen=True)
class Part:
    """Work of workers in so many equal pieces; bytes that each of them is sent which has a piece, and those that all
    pieces together send and are sent; and what each reads of the checkpoint, and all together, each its share."""

    pieces: int
    work: Work
    to_each: float = 0.0
    to_one: float = 0.0
    read: float = 0.0
    read_in_all: float = 0.0

    def seconds(self, thread: MachineSpeed, workers: int, threads: int) -> float:
        """Returns how long the workers take: as many rounds of pieces as there are for the busiest."""
        return self.work.seconds(thread) / self.pieces * math.ceil(self.pieces / workers) / threads

    def sent(self, workers: int) -> float:
        """Returns the bytes that the exporting process' network moves."""
        return self.to_each * (1 + math.log2(min(workers, self.pieces))) + self.to_one

    def read_by(self, workers: int) -> float:
        """Returns the bytes that workers together read of the checkpoint."""
        return self.read * min(workers, self.pieces) + self.read_in_all

    def read_by_each(self, workers: int) -> float:
        """Returns the bytes that one of so many workers reads of the checkpoint."""
        return self.read + self.read_in_all / min(workers, self.pieces)


def parts(config: ModelConfig, tokens: int, solves_experts: bool) -> Iterator[Part]:
    """Yields the parts of a model's layers when its text goes through them twice, exact and rounded, and they are
    solved."""
    decoder = decoder_of(config)
    length = min(LONGEST, tokens)
    forward = forward_work(config, tokens, length, tokens / length) * (1 / config.num_hidden_layers)
    batches = math.ceil(tokens / TOGETHER)
    for layer in decoder.layers:
        solved = [given for given in layer.inputs if not given.routed]
        weights = sum(_rows(given) * given.width for given in solved)
        moved = 2.0 * _FLOAT * tokens * (2 * config.hidden_size + sum(given.width for given in solved))
        if len(solved) == len(layer.inputs):
            # Once in the survey; in the solver solved matrices come as their blocks.
            yield Part(batches, forward * 2, _BLOCKS * weights, moved, 2.0 * _STORED * weights)
        else:
            yield _experts(config, layer, tokens, forward, solves_experts)
        for given in solved:
            yield from _solving(given, tokens)


def _experts(config: ModelConfig, layer: DecoderLayer, tokens: int, forward: Work, solves: bool) -> Part:
    """A layer's experts in both passes, rounded in the second. What stands before them is counted as theirs."""
    moe = layer.mlp
    assert isinstance(moe, Moe)
    weights = sum(_rows(given) * given.width for given in layer.inputs if given.routed)
    read = _FLOAT * tokens * config.hidden_size
    rounding = Work(elements=(PASSES_TO_SOLVE if solves else PASSES_TO_SEARCH) * weights)
    back = 2.0 * read * moe.routing.per_token + (_BLOCKS * weights if solves else 0.0)
    return Part(len(moe.experts), forward * 2 + rounding, 2.0 * read, back, read_in_all=2.0 * _STORED * weights)


def _solving(given: LinearInput, tokens: int) -> Iterator[Part]:
    """The second moment of an input, its factor, and the matrices that read it."""
    rows, width = _rows(given), given.width
    other = min(rows, width)
    both, back = _FLOAT * tokens * (width + other), _FLOAT * width * (width + other)
    slices = math.ceil(width / ROWS) + math.ceil(other / ROWS)
    yield Part(slices, Work(products=2.0 * tokens * width * (width + other)), both, back)
    whitened = other == width
    factor = _FLOAT * width * width * (2 if whitened else 1)
    yield Part(1, Work(products=width**3 * (4 / 3 if whitened else 1 / 3)), to_one=2.0 * factor)
    work = Work(products=(3.0 if whitened else 2.0) * rows * width**2, elements=PASSES_TO_SOLVE * rows * width)
    yield Part(math.ceil(rows / ROWS), work, factor, _BLOCKS * rows * width, _STORED * rows * width * ROWS / rows)


def _rows(given: LinearInput) -> int:
    return sum(linear.out_features for linear in given.linears)


def main(words: Sequence[str]) -> int:
    """Prints the table; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["70b", "deepseek-v3"])
    parser.add_argument("--workers", default="1,8,64")
    parser.add_argument("--threads", type=int, default=8, help="of each worker")
    parser.add_argument(
        "--gigabytes", type=float, default=1.25, help="of each machine's network in a second (10 Gbit/s)"
    )
    parser.add_argument("--storage", type=float, default=5.0, help="gigabytes a second of the shared path in all")
    asked = parser.parse_args(words)
    thread = measure_speed()
    products, elements = thread.products_per_s / _GIGA, thread.elements_per_s / _GIGA
    print(f"one thread here: {products:.0f} GFLOP/s, {elements:.2f} G elements/s\n")
    print("| model | quality | workers | workers' h | network h | checkpoint h | all h |")
    print("|---|---|---|---|---|---|---|")
    for model in asked.models:
        config = read_config(ROOT / "models" / model)
        for quality in ("balanced", "best"):
            tokens = QUALITIES[quality].tokens_for(parameter_count(config))
            found = list(parts(config, tokens, QUALITIES[quality].experts != QUALITIES["balanced"].experts))
            for workers in map(int, asked.workers.split(",")):
                seconds = (
                    sum(part.seconds(thread, workers, asked.threads) for part in found),
                    sum(part.sent(workers) for part in found) / (asked.gigabytes * _GIGA),
                    sum(
                        max(part.read_by_each(workers) / asked.gigabytes, part.read_by(workers) / asked.storage) / _GIGA
                        for part in found
                    ),
                )
                hours = [x / 3600 for x in (*seconds, sum(seconds))]
                print(f"| {' | '.join([model, quality, str(workers), *(f'{x:.2f}' for x in hours)])} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
