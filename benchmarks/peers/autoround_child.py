"""Quantizes a checkpoint by AutoRound, in whose own environment this is run; a file of JSON says what is asked for.

python autoround_child.py FILE.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from auto_round import AutoRound


def main() -> None:
    """Writes the folder in GPTQ's format."""
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sequences = asked["sequences"]
    quantizer = AutoRound(
        asked["checkpoint"],
        scheme="W4A16",
        group_size=asked["group_size"],
        sym=asked["symmetric"],
        iters=asked["iterations"],
        dataset=[torch.tensor([ids]) for ids in sequences],
        nsamples=len(sequences),
        seqlen=len(sequences[0]),
        batch_size=asked["batch_size"],
        device_map="cpu",
        enable_torch_compile=False,
    )
    quantizer.quantize_and_save(asked["out"], format="auto_gptq")


if __name__ == "__main__":
    main()
