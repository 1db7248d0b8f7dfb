"""Each thing once: how often an export reads its checkpoint and its packed files, builds graphs and tokenizes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.graphs import EIGHT_BITS, export_bundle
from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.checkpoint.weights import expected_tensors, open_weights
from toolkit.partition.lower import lower
from toolkit.pipeline import calibration, calibration_cost, export
from toolkit.pipeline.text import token_sequences
from toolkit.recipe import load_recipe

CALIBRATED = ("quality=balanced", "bits_per_weight=0", "fold=false", "calibration_tokens=256")


def _conversion(bundle: Path) -> dict[str, Any]:
    conversion: dict[str, Any] = json.loads((bundle / "report.json").read_text(encoding="utf-8"))["conversion"]
    return conversion


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _norm_bytes(folder: Path) -> int:
    return sum(4 * shape[0] for name, shape in expected_tensors(read_config(folder)).items() if len(shape) == 1)


def test_every_read_of_a_checkpoint_is_counted(tiny_r1: Path) -> None:
    source = open_weights(tiny_r1, read_config(tiny_r1))
    name = "model.layers.0.mlp.down_proj.weight"
    rows, columns = expected_tensors(read_config(tiny_r1))[name]
    each = {"F32": 4}.get(source.dtype(name), 2) * columns
    assert source.bytes_read() == 0
    source.read_rows(name, 3, 10)
    assert source.bytes_read() == 7 * each
    source.read(name)
    assert source.bytes_read() == (7 + rows) * each
    for piece in source.scan(1 << 16):
        piece.release()
    assert source.bytes_read() == (7 + rows) * each + _size(tiny_r1)


@pytest.mark.parametrize("rotated", ["false", "true"])
def test_a_fast_export_reads_each_weight_once(tiny_r1: Path, tmp_path: Path, rotated: str) -> None:
    recipe = load_recipe("tiny-r1-cpu", [*EIGHT_BITS, f"rotate={rotated}"])
    bundle = export_bundle(recipe, open_checkpoint(tiny_r1), tmp_path / "b")
    made = _conversion(bundle)
    # What is rotated takes the gains of its norms along.
    assert _size(tiny_r1) <= made["bytes_read"] <= _size(tiny_r1) + _norm_bytes(tiny_r1) * (rotated == "true")
    # Read back to be hashed.
    assert made["packed_bytes_read"] == sum(path.stat().st_size for path in bundle.glob("*.data"))


def test_heads_are_padded_without_a_second_read(stories260k: Path, tmp_path: Path) -> None:
    recipe = load_recipe("cpu", ["quality=fast", "context_length=512"], str(stories260k))
    bundle = export_bundle(recipe, open_checkpoint(stories260k), tmp_path / "b")
    assert _conversion(bundle)["bytes_read"] <= _size(stories260k) + _norm_bytes(stories260k)


def _looked_at(folder: Path) -> int:
    """Some hundred rows of the head and the embedding, by which their scales and formats are judged beforehand."""
    return 2 * 1024 * read_config(folder).hidden_size * 2


def test_a_calibrated_export_reads_twice_what_text_runs_through(tiny_r1: Path, tmp_path: Path) -> None:
    """Though every matrix is solved: a layer is surveyed and solved before the next is read."""
    recipe = load_recipe("tiny-r1-cpu", [*CALIBRATED])
    bundle = export_bundle(recipe, open_checkpoint(tiny_r1), tmp_path / "b")
    size = _size(tiny_r1)
    assert 1.5 * size < _conversion(bundle)["bytes_read"] <= 2 * size + _looked_at(tiny_r1)


@pytest.mark.parametrize(("algorithm", "free", "reads"), [("imatrix", 0, 2), ("gptq", 1 << 40, 2), ("gptq", 0, 3)])
def test_a_budget_measures_divergences_in_the_same_pass(
    algorithm: str, free: int, reads: int, tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is solved waits until the budget is spent, which is known at the model's end: it is kept where it fits."""
    monkeypatch.setattr(calibration_cost, "free_memory_bytes", lambda: free)
    changes = [*CALIBRATED, "bits_per_weight=4.9", f"quantize.0.algorithm={algorithm}"]
    recipe, checkpoint = load_recipe("tiny-r1-cpu", changes), open_checkpoint(tiny_r1)
    bundle = export_bundle(recipe, checkpoint, tmp_path / "b")
    found = _conversion(bundle)["bytes_read"]
    assert (reads - 0.5) * _size(tiny_r1) < found <= reads * _size(tiny_r1) + _looked_at(tiny_r1)


def test_ranges_read_the_packed_files_once_more(tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the text that they are taken on is tokenized once, graphs are built once."""
    seen: Counter[str] = Counter()

    def counted(what: str, function: Any) -> Any:
        def call(*given: Any) -> Any:
            seen[what] += 1
            return function(*given)

        return call

    monkeypatch.setattr(calibration, "token_sequences", counted("tokenized", token_sequences))
    monkeypatch.setattr(export, "lower", counted("built", lower))
    recipe = load_recipe("tiny-r1-qnn", [*CALIBRATED, "context_length=256"])
    bundle = export_bundle(recipe, open_checkpoint(tiny_r1), tmp_path / "b")
    assert seen == {"tokenized": 1, "built": 1}
    made, data = _conversion(bundle), {path.name: path.stat().st_size for path in bundle.glob("*.data")}
    transformer = data["transformer.onnx.data"]
    read_for_ranges = made["packed_bytes_read"] - sum(data.values())
    # The transformer, and the rows of the embedding that stand in the text.
    assert 0.99 * transformer < read_for_ranges <= transformer + data["embeddings.onnx.data"]
    assert made["bytes_read"] <= 2 * _size(tiny_r1) + _looked_at(tiny_r1)
