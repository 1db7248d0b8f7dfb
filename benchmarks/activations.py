"""What a checkpoint's activations are like: massive channels of the residual stream, who has them, and k's biases.

    python -m benchmarks.activations build/models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf --text models/reasoning.jsonl

A massive activation is one beyond 100 and a thousand times the median (Sun et al., arXiv 2402.17762, section 2).
T tokens, D hidden.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.checkpoint.sublayers import Attention, Mlp
from toolkit.pipeline.text import token_sequences
from toolkit.reference.decoder import embed, read_layer

Floats = NDArray[np.float32]
_MASSIVE, _TIMES_THE_MEDIAN = 100.0, 1000.0


@dataclass(frozen=True)
class LayerRow:
    """One layer: of the stream behind it the median and largest magnitude, its massive channels, and how many of a
    sequence's tokens have them; of what linears read the largest channel over the median one; the largest bias of k."""

    layer: int
    median: float
    largest: float
    massive_channels: tuple[int, ...]
    massive_tokens: float
    qkv_ratio: float
    gate_ratio: float
    down_ratio: float
    down_largest: float
    k_bias: float


def layer_rows(checkpoint: Checkpoint, sequences: list[list[int]]) -> list[LayerRow]:
    """A row for each layer, over all tokens of the sequences."""
    config, source = checkpoint.config, checkpoint.source
    hidden, rows = [embed(source, ids) for ids in sequences], []
    for index in range(config.num_hidden_layers):
        layer = read_layer(config, source, index)
        attention, mlp = layer.anatomy.sublayers
        assert isinstance(attention, Attention)
        normed = [layer.normed(attention, x) for x in hidden]
        hidden = [layer.added(attention, x, layer.inner(attention, n)) for x, n in zip(hidden, normed, strict=True)]
        assert isinstance(mlp, Mlp)
        gates = [layer.normed(mlp, x) for x in hidden]
        inner = [layer.inner(mlp, gate) for gate in gates]
        hidden = [layer.added(mlp, x, i) for x, i in zip(hidden, inner, strict=True)]
        stream = np.abs(np.concatenate(hidden))
        median = float(np.median(stream))
        massive = stream > max(_MASSIVE, _TIMES_THE_MEDIAN * median)
        bias = names.bias(f"{layer.anatomy.prefix}self_attn.k_proj")
        rows.append(
            LayerRow(
                layer=index,
                median=median,
                largest=float(stream.max()),
                massive_channels=tuple(np.flatnonzero(massive.any(axis=0)).tolist()),
                massive_tokens=float(massive.any(axis=1).sum() / len(sequences)),
                qkv_ratio=_channel_ratio(normed),
                gate_ratio=_channel_ratio(gates),
                down_ratio=_channel_ratio(inner),
                down_largest=float(max(np.abs(i).max() for i in inner)),
                k_bias=float(np.abs(layer.tensors[bias]).max()) if bias in layer.tensors else 0.0,
            )
        )
    return rows


def _channel_ratio(inputs: list[Floats]) -> float:
    """The largest magnitude of any channel over that of the median channel."""
    channels = np.abs(np.concatenate(inputs)).max(axis=0)
    return float(channels.max() / max(np.median(channels), 1e-30))


def main() -> None:
    """Prints the rows of each checkpoint as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="folders or GGUF files")
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with a text each")
    parser.add_argument("--tokens", type=int, default=1024)
    asked = parser.parse_args()
    for place in asked.checkpoints:
        checkpoint = open_checkpoint(place)
        sequences = token_sequences(checkpoint, asked.text, asked.tokens, 64)
        print(f"\n{place.name}: {sum(map(len, sequences))} tokens in {len(sequences)} sequences\n")
        print("| layer | median | largest | massive | tokens | qkv in | gate in | down in | its largest | k bias |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for row in layer_rows(checkpoint, sequences):
            channels = ", ".join(map(str, row.massive_channels)) or "none"
            print(
                f"| {row.layer} | {row.median:.3g} | {row.largest:.4g} | {channels} | {row.massive_tokens:.1f} "
                f"| {row.qkv_ratio:.3g} | {row.gate_ratio:.3g} | {row.down_ratio:.3g} | {row.down_largest:.4g} "
                f"| {row.k_bias:.3g} |"
            )


if __name__ == "__main__":
    main()
