"""KLD of a small checkpoint's reference on rounded weights, format by format: rounding.py CHECKPOINT [JSONL].

Without a JSONL of `text`, the tokens are 16 samples of 160 that the checkpoint itself makes (temperature 1, seeded).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from toolkit.algorithms import DATA_FREE
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.checkpoint.weights import Tensors
from toolkit.evaluate.parity import Comparison
from toolkit.evaluate.rounded import RoundedTensors
from toolkit.quant.blockwise import QuantSpec
from toolkit.reference.decoder import reference_logits
from toolkit.reference.greedy import Resident

TEXT_TOKENS = 4000
HEAD = QuantSpec(bits=8, block_size=32)


def sampled(config: ModelConfig, source: Tensors) -> list[list[int]]:
    """Token ids that the checkpoint makes of its own probabilities, 16 sequences of 161."""
    generator = np.random.default_rng(0)
    sequences: list[list[int]] = []
    for _ in range(16):
        ids = [config.bos_token_id or 0]
        for _ in range(160):
            logits = reference_logits(config, source, [ids])[0][-1].astype(np.float64)
            shares = np.exp(logits - logits.max())
            ids.append(int(generator.choice(len(shares), p=shares / shares.sum())))
        sequences.append(ids)
    return sequences


def of_text(folder: Path, path: Path) -> list[list[int]]:
    """Token ids of a JSONL's texts, until there are TEXT_TOKENS."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    sequences: list[list[int]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if sum(len(ids) for ids in sequences) < TEXT_TOKENS:
            sequences.append(tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids)
    return sequences


def main(folder: Path, text: Path | None) -> None:
    """Prints a line for each format: the mean KLD of all matrices rounded so, and with an LM head of 8 bits."""
    checkpoint = open_checkpoint(folder)
    config, source = checkpoint.config, Resident(checkpoint.source)
    head = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    sequences = of_text(folder, text) if text else sampled(config, source)
    reference = reference_logits(config, source, sequences)
    for block_size in (16, 32, 64, 128):
        for symmetric in (True, False):
            for algorithm in DATA_FREE:
                spec = QuantSpec(4, block_size, symmetric, algorithm)
                rows = []
                for spec_of in (lambda _, s=spec: s, lambda name, s=spec: HEAD if head in name else s):
                    comparison = Comparison()
                    rounded = reference_logits(config, Resident(RoundedTensors(source, spec_of)), sequences)
                    for expected, actual, ids in zip(reference, rounded, sequences, strict=True):
                        comparison.add(expected, actual, ids)
                    rows.append(comparison.figures().mean_kld)
                form = "sym" if symmetric else "asym"
                print(f"{algorithm:6} {block_size:3} {form:4}  all {rows[0]:.4f}  8-bit head {rows[1]:.4f}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
