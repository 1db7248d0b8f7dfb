"""A random bf16 checkpoint of a model's true shape, in shards, to time exports on: random_checkpoint.py MODEL FOLDER.

MODEL is a folder under models/ (1.5b writes 3.6 GB, 14b 29.5 GB). The tokenizer is tiny-r1's: ids are fed, no text.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np

from toolkit.checkpoint.opened import synthetic_checkpoint
from toolkit.checkpoint.weights import WeightSource, expected_tensors

MODELS = Path(__file__).resolve().parent.parent / "models"
SHARD_BYTES = 8 << 30


def main(model: str, folder: Path) -> None:
    """Writes the model's config, a tokenizer, shards of at most SHARD_BYTES and their index."""
    folder.mkdir(parents=True)
    for path in (MODELS / model).glob("*.json"):
        shutil.copy(path, folder)
    for path in (MODELS / "tiny-r1").glob("tokenizer*.json"):
        shutil.copy(path, folder)
    checkpoint = synthetic_checkpoint(MODELS / model)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in expected_tensors(checkpoint.config).items():
        nbytes = 2 * int(np.prod(shape))
        if filled + nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes
    weight_map: dict[str, str] = {}
    for k, tensors in enumerate(shards):
        file = f"model-{k + 1:05}-of-{len(shards):06}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        write_shard(folder / file, tensors, checkpoint.source)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], source: WeightSource) -> None:
    """One safetensors file of these tensors in bfloat16, a few rows in memory at a time."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in tensors.items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors.items():
            step = max(1, (8 << 20) // int(np.prod(shape[1:])))
            for start in range(0, shape[0], step):
                values = source.read_rows(name, start, min(shape[0], start + step))
                file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
