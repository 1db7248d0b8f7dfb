"""What calibrating takes on a cluster, on paper.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.cluster [MODEL …] [--workers 8,64] [--threads 8]

Of each model's true shape the work of a layer is counted as a forecast counts it, split into what goes to workers
(calibrate/pieces.py, calibrate/side_by_side.py) and what stays in the process that exports, and the bytes sent.
Seconds are those divided by what a thread of this machine does in a second, and by the network's bytes a second. What
all workers are sent goes out as a tree, as Dask's scatter does it: it costs a copy, and one more for each doubling.
Nothing overlaps here: a bound from above for that, and from below for stragglers and for what loops of Python take.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig, read_config
from toolkit.pipeline.calibration_work import PASSES_TO_SOLVE, forward_work, layer_weights
from toolkit.pipeline.text import LONGEST
from toolkit.pipeline.work import MachineSpeed, Work, measure_speed
from toolkit.quality import QUALITIES

ROOT: Final = Path(__file__).resolve().parent.parent
_FLOAT: Final = 4


@dataclass(frozen=True)
class Shares:
    """All layers' work: that of the workers, that of the exporting process, bytes to every worker and to one of them,
    there and back."""

    mapped: Work
    alone: Work
    to_all: float
    to_one: float

    def seconds(self, thread: MachineSpeed, workers: int, threads: int, network: float) -> tuple[float, float, float]:
        """Seconds of the workers, of the exporting process, of the network."""
        sent = self.to_all * (1 + math.log2(workers)) + self.to_one
        return (self.mapped.seconds(thread) / (workers * threads), self.alone.seconds(thread) / threads, sent / network)


def shares(config: ModelConfig, tokens: int) -> Shares:
    """The shares of a model's layers when its text goes through them twice, exact and rounded, and they are solved."""
    length = min(LONGEST, tokens)
    mapped = forward_work(config, tokens, length, tokens / length) * 2
    alone, to_all, to_one = Work(), 2.0 * _FLOAT * layer_weights(config), 0.0
    for given in (given for layer in decoder_of(config).layers for given in layer.inputs):
        rows, width = sum(linear.out_features for linear in given.linears), given.width
        other = min(rows, width)
        mapped += Work(products=2.0 * tokens * width * (width + other) + 4.0 * rows * width * width)
        mapped += Work(elements=PASSES_TO_SOLVE * rows * width)
        alone += Work(products=width**3 / 3)
        to_all += _FLOAT * (tokens * (width + other) + width * width * (2 if other == width else 1))
        to_one += _FLOAT * (3 * tokens * width + width * (width + other) + 2 * rows * width)
    return Shares(mapped, alone, to_all, to_one)


def main(words: Sequence[str]) -> int:
    """Prints the table; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["14b", "70b"])
    parser.add_argument("--workers", default="1,8,64")
    parser.add_argument("--threads", type=int, default=8, help="of each worker, and of the exporting process")
    parser.add_argument("--gigabytes", type=float, default=1.25, help="of the network in a second (10 Gbit/s)")
    asked = parser.parse_args(words)
    thread = measure_speed()
    print(
        f"one thread here: {thread.products_per_s / 1e9:.0f} GFLOP/s, {thread.elements_per_s / 1e9:.2f} G elements/s\n"
    )
    print("| model | quality | workers | workers' h | exporting process h | network h | all h |")
    print("|---|---|---|---|---|---|---|")
    for model in asked.models:
        config = read_config(ROOT / "models" / model)
        for quality in ("balanced", "best"):
            found = shares(config, QUALITIES[quality].tokens)
            for workers in map(int, asked.workers.split(",")):
                hours = [x / 3600 for x in found.seconds(thread, workers, asked.threads, asked.gigabytes * 1e9)]
                cells = [model, quality, str(workers), *(f"{x:.2f}" for x in (*hours, sum(hours)))]
                print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
