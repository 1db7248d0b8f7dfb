"""AutoRound (SignRound, arXiv 2309.05516), in an environment of its own: it wants torch and a newer transformers.

It runs on a CPU, though it is made for GPUs: an iteration over a layer of a 135M takes a third of a second a thousand
tokens. Its files are GPTQ's, which the toolkit reads as checkpoints; embedding and LM head stay floats.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.tool import Cost, PeerError, own_python, run_tool
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.checkpoint.safetensors import TensorRef, read_header
from toolkit.checkpoint.weights import expected_tensors, weight_files
from toolkit.names import CONFIG_FILE

VERSION: Final = "0.16.1"
_PACKAGES: Final = (f"auto-round=={VERSION}", "torch==2.13.0", "transformers==5.24.0")
# Whether codes stand around the middle of their range, by the name of the row.
SYMMETRIC: Final = {"auto-round": True, "auto-round asymmetric": False}
# Its own default is 200 with 8 sequences each: a 135M would take two hours of a core, where this is a quarter of one.
ITERATIONS: Final = 100
BATCH_SIZE: Final = 2
_GROUP_SIZE: Final = 32
# What stands beside a matrix' codes in GPTQ's format.
_CODED: Final = ("qweight", "qzeros", "scales", "g_idx")


def autoround_python(folder: Path) -> Path:
    """The Python of the environment, made in `folder` the first time. Raises PeerError if it cannot be."""
    return own_python(folder, f"auto-round-{VERSION}", _PACKAGES)


def quantize(python: Path, checkpoint: Path, sequences: Sequence[list[int]], symmetric: bool, out: Path) -> Cost:
    """A folder of a local checkpoint in 4 bits; the time is the whole process, Python and torch included. It takes
    sequences of one length alone, so what there is is joined and cut by the longest."""
    out.mkdir(parents=True, exist_ok=True)
    request = out.with_name(out.name + ".json")
    asked = {
        "checkpoint": str(checkpoint),
        "sequences": _of_one_length(sequences),
        "out": str(out),
        "symmetric": symmetric,
        "group_size": _GROUP_SIZE,
        "iterations": ITERATIONS,
        "batch_size": BATCH_SIZE,
    }
    request.write_text(json.dumps(asked), encoding="utf-8")
    command = [str(python), str(Path(__file__).with_name("autoround_child.py")), str(request)]
    log = out.with_name(out.name + ".log")
    return run_tool(command, log, {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"})


def written(out: Path) -> Path:
    """The folder in Hugging Face layout that `quantize` wrote: it lies in `out`, named by bits and group size. Raises
    PeerError where there is none."""
    found = sorted(path.parent for path in out.glob(f"*/{CONFIG_FILE}"))
    if not found:
        raise PeerError(f"{out} holds no folder that AutoRound wrote")
    return found[-1]


def _of_one_length(sequences: Sequence[list[int]]) -> list[list[int]]:
    """The same tokens in pieces as long as the longest sequence, the last ones left out."""
    joined, length = [token for ids in sequences for token in ids], max(map(len, sequences))
    return [joined[start : start + length] for start in range(0, len(joined) - length + 1, length)]


class AutoRoundWeights:
    """`Tensors` of a folder that AutoRound wrote: matrices dequantized, the rest as it is stored.

    Raises PeerError where a linear of a layer was left in floats.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self._source, self.config = open_checkpoint(folder).source, checkpoint.config
        self._stored = {name: ref for path in weight_files(folder) for name, ref in read_header(path).items()}
        shapes = expected_tensors(checkpoint.config)
        self._matrices = {name: _parts(name, self._stored) for name, shape in shapes.items() if len(shape) == 2}
        self._sizes = {name: shapes[name][0] * shapes[name][1] for name in self._matrices}
        for name in self._floats():
            if ".layers." in name:
                raise PeerError(f"{folder} has {name} in floats, expected GPTQ's codes")

    def names(self) -> list[str]:
        """Lists every tensor."""
        return self._source.names()

    def read(self, name: str) -> NDArray[np.float32]:
        """Reads a whole tensor as float32, dequantized."""
        return self._source.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Reads rows of a tensor as float32, dequantized."""
        return self._source.read_rows(name, start, stop)

    def matrix_bytes(self) -> int:
        """What the matrices take in the file, all that stands beside their codes included."""
        return sum(ref.nbytes for parts in self._matrices.values() for ref in parts)

    def linear_bits_per_weight(self) -> float:
        """Of the matrices that are quantized alone."""
        coded = self._matrices.keys() - self._floats()
        nbytes = sum(ref.nbytes for name in coded for ref in self._matrices[name])
        return 8 * nbytes / sum(self._sizes[name] for name in coded)

    def floats(self) -> str:
        """Says which matrices are floats, and of which type."""
        return ", ".join(f"{self._matrices[name][0].dtype} {name.rpartition('.')[0]}" for name in self._floats())

    def _floats(self) -> list[str]:
        return [name for name, parts in self._matrices.items() if parts[0].name == name]


def _parts(name: str, stored: dict[str, TensorRef]) -> list[TensorRef]:
    """The tensors that a matrix of the checkpoint is stored as."""
    if name in stored:
        return [stored[name]]
    module = name.rpartition(".")[0]
    return [stored[f"{module}.{part}"] for part in _CODED if f"{module}.{part}" in stored]
