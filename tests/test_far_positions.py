"""Positions beyond 4,096 on the NPU: single windows in HTP's simulator, beside transformers and the CPU's kernels."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.compiler import needs_compiler
from tests.graphs import export_bundle
from tests.random_models import make_checkpoint
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.evaluate.positions import Pipeline
from toolkit.recipe import load_recipe

WINDOW, CONTEXT = 64, 8192
FIRST = (64, 4096, 8064)
SHAPE = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": CONTEXT}
EIGHT_BITS = "quantize=[{match: '*', bits: 8}]"
CHANGES = ("quality=fast", f"context_length={CONTEXT}", f"window={WINDOW}", EIGHT_BITS)
# Apart, as `toolkit.evaluate.simulator` does it: windows in the simulator, fed as the CPU's were.
SIMULATED = """
import sys, tempfile
from pathlib import Path
import numpy as np
from toolkit.bundle.settings import read_settings
from toolkit.epcontext.htp import open_htp

bundle, folder = map(Path, sys.argv[1:])
with tempfile.TemporaryDirectory() as own:
    session = open_htp(bundle / "context.onnx", read_settings(bundle).soc_options(), {}, Path(own))
    for given in sorted(folder.glob("given-*.npz")):
        with np.load(given) as feeds:
            (hidden,) = session.run(["last_hidden_states"], dict(feeds))
        np.save(folder / given.name.replace("given-", "made-").replace(".npz", ".npy"), hidden)
"""
Floats = NDArray[np.float32]


def _rms_error(found: NDArray[Any], expected: Floats) -> float:
    wide = expected.astype(np.float64)
    return float(np.sqrt(((found.astype(np.float64) - wide) ** 2).mean()) / wide.std())


@needs_compiler
def test_the_simulator_computes_what_transformers_does_at_far_positions(tmp_path: Path) -> None:
    model = make_checkpoint("Qwen2", SHAPE, tmp_path / "c")
    checkpoint = replace(open_checkpoint(tmp_path / "c"), synthetic=True)  # ranges on random ids
    bundle = export_bundle(load_recipe("qnn", CHANGES, str(tmp_path / "c")), checkpoint, tmp_path / "b")
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 96, FIRST[-1] + WINDOW)]
    with torch.no_grad():
        expected = model.model(torch.tensor([ids])).last_hidden_state.numpy()
    windows = enumerate(Pipeline(bundle, exact=True).stage_runs(ids))
    fed = {k * WINDOW: run for k, (run, _) in windows if k * WINDOW in FIRST}
    for first, run in fed.items():
        feeds: dict[str, Any] = run.feeds
        np.savez(tmp_path / f"given-{first:05d}.npz", **feeds)
    subprocess.run([sys.executable, "-c", SIMULATED, str(bundle), str(tmp_path)], check=True)
    for first, run in fed.items():
        made = np.load(tmp_path / f"made-{first:05d}.npy")
        exact = expected[:, first : first + WINDOW]
        # .024 to .034, of 8-bit weights; by positions as float16 holds them .44 beyond 4,096.
        assert _rms_error(made, exact) < 0.06
        # .0026 to .0029, whatever the number of keys: float16's scores.
        assert _rms_error(made, run.hidden) < 0.006
