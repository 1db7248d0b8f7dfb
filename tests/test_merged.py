"""Tensors of a checkpoint that hold several linears, and heads of which RoPE turns a part: every row as transformers
has it, whether it is read or streams by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.random_models import CASES, make_checkpoint
from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.checkpoint.partial_rotary import order_of_channels
from toolkit.checkpoint.rotated import rotate
from toolkit.checkpoint.weights import expected_tensors
from toolkit.reference.decoder import reference_logits

# Of 16 channels the first 12 turn, i with i + 6: what stands in each place.
ORDER = [0, 1, 2, 3, 4, 5, 12, 13, 6, 7, 8, 9, 10, 11, 14, 15]


def test_halves_of_a_head_end_in_what_rope_leaves() -> None:
    assert order_of_channels(16, 12).tolist() == ORDER
    assert order_of_channels(8, 8).tolist() == list(range(8))


@pytest.mark.parametrize("chunk_bytes", [700, 1 << 20])
def test_each_linear_has_its_rows_of_the_merged_tensor(chunk_bytes: int, tmp_path: Path) -> None:
    model = make_checkpoint(*CASES["phi3"], tmp_path)
    source, stored = open_checkpoint(tmp_path).source, dict(model.named_parameters())
    prefix = "model.layers.1."
    qkv = stored[f"{prefix}self_attn.qkv_proj.weight"].detach().numpy()
    heads = qkv[64:96].reshape(2, 16, 64)[:, ORDER].reshape(32, 64)
    assert np.array_equal(source.read(f"{prefix}self_attn.k_proj.weight"), heads)
    assert np.array_equal(source.read_rows(f"{prefix}self_attn.k_proj.weight", 5, 19), heads[5:19])
    assert np.array_equal(source.read(f"{prefix}self_attn.v_proj.weight"), qkv[96:])
    gate_up = stored[f"{prefix}mlp.gate_up_proj.weight"].detach().numpy()
    assert np.array_equal(source.read_rows(f"{prefix}mlp.up_proj.weight", 7, 20), gate_up[119:132])
    seen: dict[str, list[np.ndarray]] = {}
    for rows in source.scan(chunk_bytes):
        seen.setdefault(rows.name, []).append(source.decode(rows, rows.start, rows.stop).copy())
        rows.release()
    assert sorted(seen) == sorted(source.names()) == sorted(expected_tensors(read_config(tmp_path)))
    assert all(np.array_equal(np.concatenate(pieces), source.read(name)) for name, pieces in seen.items())


def test_a_rotated_checkpoint_computes_the_same(tmp_path: Path) -> None:
    make_checkpoint(*CASES["phi3-sliding-narrow-heads"], tmp_path)
    checkpoint, ids = open_checkpoint(tmp_path), list(range(3, 43))
    (exact,) = reference_logits(checkpoint.config, checkpoint.source, [ids])
    (turned,) = reference_logits(checkpoint.config, rotate(checkpoint).source, [ids])
    assert np.abs(turned - exact).max() <= 1e-4 * np.abs(exact).max()
