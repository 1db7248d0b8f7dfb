"""Rotation: Hadamard matrices against their definition, and a rotated checkpoint against itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.graphs import EIGHT_BITS, export_bundle
from tests.random_models import CASES, make_checkpoint
from toolkit.checkpoint.hadamard import Hadamard
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.checkpoint.rotated import rotate, salient_inputs
from toolkit.errors import UnsupportedError
from toolkit.evaluate.parity import Comparison
from toolkit.evaluate.positions import open_positions
from toolkit.pipeline.export import Order, export_bundles
from toolkit.pipeline.text import token_sequences
from toolkit.recipe import load_recipe
from toolkit.reference.decoder import reference_logits


@pytest.mark.parametrize("n", [8, 12, 16, 20, 24, 28, 40, 64, 96, 112, 128, 256, 1536, 3584])
def test_a_hadamard_matrix_is_orthogonal_and_flat(n: int) -> None:
    Q = Hadamard(n, 0).apply(np.eye(n, dtype=np.float32))
    np.testing.assert_allclose(Q @ Q.T, np.eye(n), atol=4e-6)
    np.testing.assert_allclose(np.abs(Q), 1 / np.sqrt(n), rtol=1e-4)
    other = Hadamard(n, 1).apply(np.eye(n, dtype=np.float32))
    assert np.abs(Q - other).max() > 0


@pytest.mark.parametrize("n", [4096, 5120, 8192])
def test_wide_ones_keep_lengths_and_angles(n: int) -> None:
    x = np.random.default_rng(0).standard_normal((3, 5, n)).astype(np.float32)
    y = Hadamard(n, 0).apply(x)
    assert y.shape == x.shape
    flat, turned = x.reshape(-1, n), y.reshape(-1, n)
    np.testing.assert_allclose(turned @ turned.T, flat @ flat.T, atol=1e-3 * n**0.5)
    # One loud channel is spread over all.
    loud = np.zeros((1, n), np.float32)
    loud[0, 7] = n**0.5
    np.testing.assert_allclose(np.abs(Hadamard(n, 0).apply(loud)), 1, rtol=1e-4)


def test_a_width_without_a_matrix_is_refused() -> None:
    for n in (6, 172, 172 * 2 + 2):
        with pytest.raises(UnsupportedError, match="rotate=false"):
            Hadamard(n, 0)


@pytest.mark.parametrize(
    "case",
    [
        "qwen2",
        "llama-bias",
        "llama-llama3",
        "mistral-sliding",
        "qwen3",
        "llama-narrow-heads",
        "smollm3-narrow-heads",
        "deepseek-v2",
        "deepseek-v3",
    ],
)
def test_a_rotated_checkpoint_computes_the_same(case: str, tmp_path: Path) -> None:
    make_checkpoint(*CASES[case], tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    rotated = rotate(checkpoint)
    ids = np.random.default_rng(1).integers(3, 96, 40).tolist()
    (plain,), (other,) = (
        reference_logits(checkpoint.config, source, [ids]) for source in (checkpoint.source, rotated.source)
    )
    assert np.abs(plain - other).max() <= 1e-4 * np.abs(plain).max()
    for name in checkpoint.source.names():
        before, after = checkpoint.source.read(name), rotated.source.read(name)
        if name.endswith("norm.weight") and "self_attn" not in name:
            assert (after == 1).all() and (before != 1).any()
        elif before.ndim == 2 and "b_proj" not in name:  # those make heads of latents, which are not turned
            assert np.abs(before - after).max() > 0.01


@pytest.mark.parametrize("chunk_bytes", [700, 1 << 20])
def test_streaming_gives_what_reading_gives(chunk_bytes: int, tmp_path: Path) -> None:
    make_checkpoint(*CASES["llama-bias"], tmp_path)
    source = rotate(open_checkpoint(tmp_path)).source
    seen: dict[str, list[np.ndarray]] = {}
    for rows in source.scan(chunk_bytes):
        for start in range(rows.start, rows.stop, 10):
            stop = min(start + 10, rows.stop)
            piece = source.decode(rows, start, stop)
            seen.setdefault(rows.name, []).append(piece.copy())
            np.testing.assert_allclose(piece, source.read_rows(rows.name, start, stop), atol=1e-6)
        rows.release()
    assert sorted(seen) == sorted(source.names())
    for name, pieces in seen.items():
        np.testing.assert_allclose(np.concatenate(pieces), source.read(name), atol=1e-6)


def test_outliers_are_gone(tiny_r1: Path) -> None:
    """tiny-r1's salient channels: what reads them has columns far smaller than the others, until it is rotated."""
    checkpoint = open_checkpoint(tiny_r1)
    rotated = rotate(checkpoint)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate_proj.weight"):
        before, after = (np.abs(c.source.read(name)).mean(axis=0) for c in (checkpoint, rotated))
        assert after.max() / after.min() < 3 < 12 < before.max() / before.min()


def test_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    make_checkpoint(*CASES["qwen2-tied"], tmp_path)
    with pytest.raises(UnsupportedError, match="tied embedding cannot be rotated"):
        rotate(open_checkpoint(tmp_path))


def test_a_rotated_bundle_computes_what_the_checkpoint_does(tiny_r1: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    (ids, *_) = token_sequences(checkpoint, tiny_r1 / "arithmetic.jsonl", 160, 160)
    (expected,) = reference_logits(checkpoint.config, checkpoint.source, [ids])
    recipes = [load_recipe("tiny-r1-cpu", [*EIGHT_BITS, f"rotate={word}"]) for word in ("true", "false")]
    bundle = export_bundle(recipes[0], checkpoint, tmp_path / "fp32", "fp32")
    assert np.abs(open_positions(bundle).logits(ids) - expected).max() <= 1e-3
    # Quantized, one of each in one run: two passes, and neither has the other's weights.
    bundles = export_bundles([Order(r, tmp_path / str(r.rotate)) for r in recipes], checkpoint)
    for bundle in bundles:
        error = open_positions(bundle, exact=True).logits(ids) - expected
        assert 1e-4 < np.sqrt(np.mean(error**2)) / expected.std() < 0.05


def test_without_data_salient_channels_are_rotated_away(tiny_r1: Path, tmp_path: Path) -> None:
    """A third of the divergence of rounding as it is (LOG.md), and the report still says that data would do better."""
    checkpoint = open_checkpoint(tiny_r1)
    sequences = token_sequences(checkpoint, tiny_r1 / "arithmetic.jsonl", 600, 160)
    expected = reference_logits(checkpoint.config, checkpoint.source, sequences)
    klds, sections = {}, {}
    for name, changes in (("by itself", []), ("left", ["rotate=false"])):
        recipe = load_recipe("tiny-r1-cpu", ["quality=fast", "bits_per_weight=0", *changes])
        bundle = export_bundle(recipe, checkpoint, tmp_path / name)
        compared, positions = Comparison(), open_positions(bundle, exact=True)
        for ids, logits in zip(sequences, expected, strict=True):
            compared.add(logits, positions.logits(ids), ids)
        klds[name] = compared.figures().mean_kld
        sections[name] = json.loads((bundle / "report.json").read_text(encoding="utf-8"))["quantization"]
    assert klds["by itself"] < 0.5 * klds["left"]
    assert sections["by itself"]["rotated"] and "rotated" not in sections["left"]
    for section in sections.values():
        assert len(section["salient_inputs"]) == 2 * checkpoint.config.num_hidden_layers + 1


def test_nothing_salient_nothing_turned(tmp_path: Path) -> None:
    make_checkpoint(*CASES["qwen2"], tmp_path)
    assert salient_inputs(open_checkpoint(tmp_path)) == []
