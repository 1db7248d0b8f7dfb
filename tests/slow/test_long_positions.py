"""An NPU's stages at positions beyond 4,096, in the vendor's simulator beside ORT's kernels and the exact model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest

from tests.compiler import needs_compiler
from tests.graphs import EIGHT_BITS, export_bundle
from toolkit import names
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.evaluate.positions import Pipeline
from toolkit.evaluate.simulator import simulated_hidden
from toolkit.pipeline.text import token_sequences
from toolkit.recipe import load_recipe
from toolkit.reference.decoder import reference_logits

LATE: Final = 4096
TOKENS: Final = LATE + 300
CHANGES: Final = ("context_length=8192", "window=512", *EIGHT_BITS)


@pytest.fixture(scope="module")
def checkpoint(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """tiny-r1 said to read 8,192 tokens: its answers there mean nothing, its numbers are what they are."""
    folder = Path(shutil.copytree(tiny_r1, tmp_path_factory.mktemp("long") / "tiny-r1"))
    config = json.loads((folder / names.CONFIG_FILE).read_text(encoding="utf-8"))
    (folder / names.CONFIG_FILE).write_text(json.dumps({**config, "max_position_embeddings": 8192}), encoding="utf-8")
    return open_checkpoint(folder)


def _rms(values: npt.NDArray[Any]) -> float:
    return float(np.sqrt((values.astype(np.float64) ** 2).mean()))


@needs_compiler
def test_the_simulator_agrees_beyond_4096_tokens(checkpoint: Checkpoint, tiny_r1: Path, tmp_path: Path) -> None:
    recipe = load_recipe("tiny-r1-qnn", CHANGES)
    bundle = export_bundle(recipe, checkpoint, tmp_path / "b")
    ids = [token for some in token_sequences(checkpoint, tiny_r1 / "arithmetic.jsonl", TOKENS, 512) for token in some]
    ids = ids[:TOKENS]
    assert len(ids) == TOKENS
    pipeline = Pipeline(bundle, exact=True)
    (made,) = simulated_hidden(bundle, pipeline, [ids])
    runs = [(run.hidden[:, :kept]) for run, kept in pipeline.stage_runs(ids, TOKENS) if run.output == names.LAST_HIDDEN]
    on_cpu = np.concatenate(runs, axis=1)
    errors = [_rms((made - on_cpu)[:, rows]) / _rms(on_cpu[:, rows]) for rows in (slice(LATE), slice(LATE, None))]
    print(f"rms error up to {LATE} and behind it: {errors[0]:.4f} {errors[1]:.4f}")
    assert errors[1] < 0.02 and errors[1] < 2 * errors[0]
    (exact,) = reference_logits(checkpoint.config, checkpoint.source, [ids])
    agree = pipeline.head(ids, made)[LATE:].argmax(axis=-1) == exact[LATE:].argmax(axis=-1)
    print(f"best token as the exact model's behind it: {agree.mean():.3f}")
    assert agree.mean() > 0.9
