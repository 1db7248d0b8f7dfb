"""AutoRound itself, installed into build/ first: its folder of a small trained model is read and counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import autoround
from tests.conftest import ROOT
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.pipeline.text import token_sequences


@pytest.mark.parametrize("name", autoround.SYMMETRIC)
def test_its_matrices_are_near_the_checkpoints_in_sixteen_values_a_group(
    name: str, tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoround, "ITERATIONS", 2)
    checkpoint = open_checkpoint(tiny_r1)
    sequences = token_sequences(checkpoint, tiny_r1 / "calibration.jsonl", 1024, shortest=160)
    python = autoround.autoround_python(ROOT / "build" / "peers")
    autoround.quantize(python, tiny_r1, sequences, autoround.SYMMETRIC[name], tmp_path)
    weights = autoround.AutoRoundWeights(autoround.written(tmp_path), checkpoint)
    linear = "model.layers.1.mlp.gate_proj.weight"
    made, meant = weights.read(linear), checkpoint.source.read(linear)
    assert 0.02 < np.linalg.norm(made - meant) / np.linalg.norm(meant) < 0.2
    values = [len(np.unique(group)) for group in made[:8].reshape(-1, 32)]
    assert 8 < max(values) <= 16
    assert 4.6 < weights.linear_bits_per_weight() < 5
