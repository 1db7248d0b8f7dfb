"""Tuning: gradients are those of the KLD that is measured, what is left out gets better, and integers stand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.graphs import export_bundle
from tests.random_models import CASES, make_checkpoint
from tests.sources import Changed
from toolkit.calibrate import tuning as tuning_module
from toolkit.calibrate.tuning import Stored, check_tunable, tune
from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.device.arrays import Device
from toolkit.device.chosen import chosen_device
from toolkit.errors import MachineError, RecipeError
from toolkit.evaluate.parity import Comparison
from toolkit.partition.stored import StoredTensors
from toolkit.pipeline import tuning as tuning_story
from toolkit.pipeline.plan import plan_export
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, dequantize_blocks, quantize_blocks
from toolkit.recipe import Recipe, load_recipe
from toolkit.reference.decoder import reference_logits
from toolkit.target import CPU_FORM, TARGETS

pytest.importorskip("torch")
SPEC = QuantSpec(4, 32)


class _Rounded(Changed):
    """A checkpoint whose matrices are rounded."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        source = checkpoint.source
        matrices = {n: source.read(n) for n, shape in decoder_of(checkpoint.config).tensors.items() if len(shape) == 2}
        self._rounded = {name: quantize_blocks(weight, SPEC) for name, weight in matrices.items()}
        restored = {
            name: dequantize_blocks(blocks, SPEC, matrices[name].shape[1]) for name, blocks in self._rounded.items()
        }
        super().__init__(source, restored)

    def blocks(self, name: str) -> tuple[QuantizedBlocks, QuantSpec] | None:
        return (self._rounded[name], SPEC) if name in self._rounded else None


@pytest.fixture(scope="module")
def torch_cpu() -> Device:
    return chosen_device("torch")


def _text(count: int = 9) -> list[list[int]]:
    """Three passages in turns: random weights have learned nothing that one text could say of another."""
    generator = np.random.default_rng(4)
    passages = [generator.integers(3, 96, 40).tolist() for _ in range(3)]
    return [passages[k % 3] for k in range(count)]


def _kld(checkpoint: Checkpoint, tensors: Changed, sequences: list[list[int]]) -> float:
    compared, config = Comparison(), checkpoint.config
    exact = reference_logits(config, checkpoint.source, sequences)
    for ids, wanted, found in zip(sequences, exact, reference_logits(config, tensors, sequences), strict=True):
        compared.add(wanted, found, ids)
    return float(compared.figures().mean_kld)


# With a tied table and without, gains over heads, and behind sublayers.
@pytest.mark.parametrize("case", ["qwen2-tied", "qwen3", "gemma3"])
def test_what_is_left_out_gets_better_by_as_much_as_is_said(
    case: str, torch_cpu: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random weights lose a hundred times what trained ones do.
    monkeypatch.setattr(tuning_module, "_RATE", 5e-3)
    make_checkpoint(*CASES[case], tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    stored, text = _Rounded(checkpoint), _text()
    made = tune(checkpoint.config, checkpoint.source, stored, text, 10, torch_cpu)
    left_out = text[::8]
    assert made.tokens == sum(map(len, left_out))
    assert made.kld_before == pytest.approx(_kld(checkpoint, stored, left_out), rel=1e-3)
    changes: dict[str, NDArray[np.float32]] = dict(made.gains)
    for name, scales in made.scales.items():
        found = stored.blocks(name)
        assert found is not None
        changes[name] = dequantize_blocks(replace(found[0], scales=scales), SPEC, stored.read(name).shape[1])
    after = _kld(checkpoint, Changed(stored, changes), left_out)
    assert made.kld_after == pytest.approx(after, rel=1e-3)
    assert made.kld_after < 0.98 * made.kld_before
    norms = {norm.weight for layer in decoder_of(checkpoint.config).layers for norm in layer.norms}
    assert norms < set(made.gains)


@pytest.mark.parametrize("case", ["qwen2-tied", "qwen3"])
def test_gradients_are_those_of_differences(case: str, torch_cpu: Device, tmp_path: Path) -> None:
    make_checkpoint(*CASES[case], tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    config, source, stored, text = checkpoint.config, checkpoint.source, _Rounded(checkpoint), _text(1)
    head = decoder_of(config).head.weight
    names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight", head)
    hidden = tuning_module.reference_hidden(config, source, text, on=torch_cpu)
    model = tuning_module._TunedModel(config, stored, torch_cpu, torch_cpu.from_host(source.read(head)))
    texts = [(ids, torch_cpu.from_host(x)) for ids, x in zip(text, hidden, strict=True)]
    for name in names:
        each, tokens, step = model.tuned[name], len(text[0]), 3e-2
        model.learn(*texts[0], 1 / tokens)
        for other in model.tuned.values():
            other.pull()
        assert each.factors.grad is not None
        found = each.factors.grad[5, 0].item()
        judged = []
        for factor in (1 + step, 1 - step):
            each.factors[5, 0] = factor
            judged.append(model.judged(texts))
        each.factors[5, 0] = 1.0
        assert found == pytest.approx((judged[0] - judged[1]) / (2 * step), rel=0.05, abs=2e-7), name


def test_nothing_is_taken_that_is_no_better(torch_cpu: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(*CASES["qwen2"], tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    monkeypatch.setattr(tuning_module, "_RATE", 0.5)
    made = tune(checkpoint.config, checkpoint.source, _Rounded(checkpoint), _text(), 2, torch_cpu)
    assert made.scales == {} and made.gains == {} and made.kld_after == made.kld_before


def _recipe(checkpoint: Path, *changes: str) -> Recipe:
    fixed = ("context_length=64", "validate={}", "calibration_tokens=600", "tuning_steps=3")
    return load_recipe("cpu", [*fixed, *changes], str(checkpoint))


def test_a_bundle_has_the_same_integers_and_other_scales(
    stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first run is killed while what was found is written."""
    monkeypatch.setattr(tuning_module, "_RATE", 3e-3)
    checkpoint, recipe = open_checkpoint(stories260k), _recipe(stories260k)
    plain = export_bundle(replace(recipe, tuning_steps=0), checkpoint, tmp_path / "plain")
    tuned = export_bundle(recipe, checkpoint, tmp_path / "tuned")
    plan = plan_export(recipe, checkpoint, tmp_path / "tuned", "int4")
    before, after = (StoredTensors(plan.layout, bundle) for bundle in (plain, tuned))
    name = "model.layers.2.mlp.up_proj.weight"
    old, new = before.blocks(name), after.blocks(name)
    assert old is not None and new is not None
    assert (old[0].packed == new[0].packed).all()
    moved = np.abs(new[0].scales / old[0].scales - 1)
    assert 0 < moved.mean() < 0.01
    assert np.abs(after.read("model.norm.weight") - before.read("model.norm.weight")).max() > 0
    report = json.loads((tuned / "report.json").read_text(encoding="utf-8"))["quantization"]
    said = report["calibration"]["tuned"]
    assert said["steps"] == 3 and said["kld_after"] < said["kld_before"]
    page = (tuned / "report.html").read_text(encoding="utf-8")
    assert f"from {said['kld_before']:.4g} to {said['kld_after']:.4g}, the weights alone" in page
    assert "were tuned in" not in (plain / "report.html").read_text(encoding="utf-8")
    weight = plan.checkpoint.source.read(name)
    row = next(row for row in report["tensors"] if row["name"] == name)
    lost = np.square(after.read(name) - weight).sum() / np.square(weight).sum()
    assert 10 ** (-row["sqnr_db"] / 10) == pytest.approx(lost, rel=1e-3)

    class KilledError(Exception):
        pass

    written: list[str] = []

    def killed(stored: Stored, tensor: str, scales: NDArray[np.float32]) -> None:
        written.append(tensor)
        if len(written) > 4:
            raise KilledError
        return rescaled(stored, tensor, scales)  # type: ignore[arg-type, return-value]

    rescaled = tuning_story._rescaled
    monkeypatch.setattr(tuning_story, "_rescaled", killed)
    with pytest.raises(KilledError):
        export_bundle(recipe, checkpoint, tmp_path / "killed")
    monkeypatch.setattr(tuning_story, "_rescaled", rescaled)
    monkeypatch.setattr(tuning_story, "tune", None)
    again = export_bundle(recipe, checkpoint, tmp_path / "killed")
    for path in tuned.glob("*.data"):
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_what_cannot_be_tuned_is_one_line(stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="tuning_steps is -1, expected a count of steps"):
        _recipe(stories260k, "tuning_steps=-1")
    with pytest.raises(RecipeError, match="tuning_steps is 3, and quality fast reads no text to tune on"):
        _recipe(stories260k, "quality=fast")
    make_checkpoint(*CASES["qwen3-moe"], tmp_path)
    with pytest.raises(RecipeError, match="without experts"):
        check_tunable(open_checkpoint(tmp_path).config, CPU_FORM)
    config = open_checkpoint(stories260k).config
    with pytest.raises(RecipeError, match="scales of their own"):
        check_tunable(config, TARGETS["qnn"].in_profile("lpbq").in_precision("int4").form)
    with pytest.raises(RecipeError, match="two passages"):
        tune(config, open_checkpoint(stories260k).source, None, [[1, 2]], 1, chosen_device("torch"))  # type: ignore[arg-type]

    def missing(_: str) -> Device:
        raise MachineError("device 'torch' needs torch, which is not installed")

    monkeypatch.setattr(tuning_story, "chosen_device", missing)
    with pytest.raises(MachineError, match="needs torch"):
        export_bundle(_recipe(stories260k), open_checkpoint(stories260k), tmp_path / "bundle")
    assert not list(tmp_path.glob("bundle*"))
