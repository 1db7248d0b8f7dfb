"""A second oracle: optimum's own ONNX export of the same checkpoint, by another tracer through other operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.graphs import write_graphs
from tests.random_models import CASES, make_checkpoint
from toolkit.evaluate.positions import open_positions

pytestmark = pytest.mark.filterwarnings("ignore")  # the tracer's own, by the dozen
onnx_export = pytest.importorskip("optimum.exporters.onnx", reason="optimum-onnx is not installed")


@pytest.mark.parametrize("case", ["qwen2", "llama-llama3", "mistral-sliding", "qwen3"])
def test_fp32_graph_agrees_with_optimums_export(case: str, tmp_path: Path) -> None:
    import onnxruntime as ort

    make_checkpoint(*CASES[case], tmp_path / "checkpoint")
    onnx_export.main_export(
        str(tmp_path / "checkpoint"),
        str(tmp_path / "optimum"),
        task="text-generation",
        do_validation=False,
        no_post_process=True,
        device="cpu",
    )
    ids = [int(i) for i in np.random.default_rng(3).integers(3, 96, 40)]
    session = ort.InferenceSession(str(tmp_path / "optimum" / "model.onnx"), providers=["CPUExecutionProvider"])
    feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, 40), np.int64)}
    feed["position_ids"] = np.arange(40)[None]
    names = [value.name for value in session.get_inputs()]
    (theirs,) = session.run(["logits"], {name: feed[name] for name in names})
    write_graphs(tmp_path / "checkpoint", tmp_path)
    assert np.abs(open_positions(tmp_path).logits(ids) - theirs[0]).max() <= 1e-3
