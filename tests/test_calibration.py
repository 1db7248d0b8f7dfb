"""Calibration as it runs: what the survey measures, what GPTQ solves against, what an interruption costs, what goes
wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tests.command_line import called
from tests.graphs import export_bundle
from tests.random_models import CASES, make_checkpoint
from tests.sources import Changed
from toolkit.calibrate import input_solver
from toolkit.calibrate.input_solver import InputSolver, Problem
from toolkit.calibrate.solve import solve
from toolkit.calibrate.survey import Survey, Wish, survey
from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.folded import FoldedTensors
from toolkit.checkpoint.linears import LinearInput
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.device.arrays import NUMPY
from toolkit.evaluate.parity import Comparison
from toolkit.evaluate.positions import open_positions
from toolkit.graph import layout
from toolkit.names import weight
from toolkit.pipeline.export import Order, export_bundles
from toolkit.pipeline.text import token_sequences
from toolkit.quant.activations import Rounding, rounded_activations
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, dequantize_blocks, quantize_blocks
from toolkit.quant.gptq import corrected_target, factorize
from toolkit.quant.ranges import ActivationRange
from toolkit.quant.visits import Solved
from toolkit.recipe import Recipe, load_recipe
from toolkit.reference import decoder
from toolkit.reference.decoder import embed, read_layer, reference_hidden, reference_logits
from toolkit.target import TARGETS

Floats = NDArray[np.float32]
ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "models" / "tiny-r1" / "arithmetic.jsonl"
BLOCK = 32


class _Kept:
    """What GPTQ writes, by tensor."""

    resumed = True

    def __init__(self) -> None:
        self.blocks: dict[str, QuantizedBlocks] = {}
        self.commits = 0

    def write(self, tensor: str, start: int, signal: float, blocks: QuantizedBlocks) -> None:
        assert start == 0 and tensor not in self.blocks
        self.blocks[tensor] = blocks

    def commit(self) -> None:
        self.commits += 1


def _checkpoint(case: str, folder: Path) -> tuple[Checkpoint, list[list[int]]]:
    """A random checkpoint, and some ids for it."""
    make_checkpoint(*CASES[case], folder)
    rng = np.random.default_rng(5)
    return open_checkpoint(folder), [rng.integers(3, 96, n).tolist() for n in (40, 30, 50)]


def _specs(checkpoint: Checkpoint, algorithm: str) -> dict[str, QuantSpec]:
    linears = [weight(r) for given in decoder_of(checkpoint.config).inputs for r in given.readers]
    return {t: QuantSpec(4, BLOCK, algorithm=algorithm) for t in {*linears, "model.embed_tokens.weight"}}


def _mean_kld(checkpoint: Checkpoint, changed: Any, sequences: list[list[int]]) -> float:
    compared = Comparison()
    plain = reference_logits(checkpoint.config, checkpoint.source, sequences)
    others = reference_logits(checkpoint.config, changed, sequences)
    for ids, expected, actual in zip(sequences, plain, others, strict=True):
        compared.add(expected, actual, ids)
    return float(compared.figures().mean_kld)


@pytest.mark.parametrize("case", ["qwen2", "qwen2-tied", "qwen3"])
def test_divergences_are_those_of_rounding_the_readers_alone(case: str, tmp_path: Path) -> None:
    checkpoint, sequences = _checkpoint(case, tmp_path)
    specs = _specs(checkpoint, "imatrix")
    wish = Wish(specs, Rounding.NONE, Rounding.NONE, folds=True, probes=True)
    found = survey(checkpoint.config, checkpoint.source, sequences, wish, tmp_path / "work")
    inputs = decoder_of(checkpoint.config).inputs
    folded = FoldedTensors(checkpoint.source, inputs, found.scales())
    for given in inputs:
        facts = found.inputs[given.name]
        changes = {}
        for reader in given.readers:
            spec, exact = specs[weight(reader)], folded.read(weight(reader))
            changes[weight(reader)] = dequantize_blocks(
                quantize_blocks(exact, spec, facts.importance), spec, given.width
            )
        if given.name == "model.embed_tokens":
            # A tied table is judged as a head and as an embedding at once.
            plain = checkpoint.source.read(weight(given.name))
            free = dequantize_blocks(quantize_blocks(plain, replace(spec, algorithm="kquant")), spec, given.width)
            assert np.abs(free - plain).max() > 0
            assert found.divergences[given.name] > 0
            continue
        expected = _mean_kld(checkpoint, Changed(folded, changes), sequences)
        assert found.divergences[given.name] == pytest.approx(expected, rel=0.02)


def test_rounded_activations_count_too(tmp_path: Path) -> None:
    checkpoint, sequences = _checkpoint("llama-bias", tmp_path)
    specs = _specs(checkpoint, "imatrix")
    alone, both = (
        survey(
            checkpoint.config,
            checkpoint.source,
            sequences,
            Wish(specs, rounding, rounding, False, True),
            tmp_path / rounding.name,
        ).divergences
        for rounding in (Rounding.NONE, Rounding.INT8)
    )
    layers = [name for name in alone if "layers" in name]
    assert all(both[name] != alone[name] for name in layers)
    assert sum(both[name] for name in layers) > sum(alone[name] for name in layers)


def test_importance_is_the_second_moment_of_what_arrives_after_folding(tmp_path: Path) -> None:
    checkpoint, sequences = _checkpoint("qwen2", tmp_path)
    wish = Wish(_specs(checkpoint, "imatrix"), Rounding.NONE, Rounding.NONE, folds=True, probes=False)
    found = survey(checkpoint.config, checkpoint.source, sequences, wish, tmp_path / "work")
    assert found.tokens == 120 and found.divergences == {}
    assert found.scales()
    folded = FoldedTensors(checkpoint.source, decoder_of(checkpoint.config).inputs, found.scales())
    layer = read_layer(checkpoint.config, folded, 0)
    seen = np.concatenate([layer.normed(layer.anatomy.attention, embed(folded, ids)) for ids in sequences])
    facts = found.inputs["model.layers.0.self_attn.q_proj"]
    np.testing.assert_allclose(facts.importance, (seen.astype(np.float64) ** 2).mean(axis=0), rtol=1e-3)


class _StopError(Exception):
    pass


def _stopping_at(step: str) -> Any:
    def progress(done: str) -> None:
        if done == step:
            raise _StopError

    return progress


def _equal(a: Survey, b: Survey) -> bool:
    same = a.divergences == b.divergences and a.tokens == b.tokens and list(a.inputs) == list(b.inputs)
    for name, facts in a.inputs.items():
        other = b.inputs[name]
        same &= facts.losses == other.losses and bool(np.array_equal(facts.importance, other.importance))
        ours, theirs = facts.fold.scales, other.fold.scales
        same &= ours is theirs is None or (ours is not None and theirs is not None and np.array_equal(ours, theirs))
    return same


def test_an_interrupted_survey_goes_on_after_the_last_whole_layer(tmp_path: Path) -> None:
    checkpoint, sequences = _checkpoint("qwen2", tmp_path)
    wish = Wish(_specs(checkpoint, "imatrix"), Rounding.UINT16, Rounding.INT8, folds=True, probes=True)
    whole = survey(checkpoint.config, checkpoint.source, sequences, wish, tmp_path / "whole")
    for step in ("calibrated layer 0", "calibrated layer 1"):
        with pytest.raises(_StopError):
            survey(checkpoint.config, checkpoint.source, sequences, wish, tmp_path / step, _stopping_at(step))
        again: list[str] = []
        resumed = survey(checkpoint.config, checkpoint.source, sequences, wish, tmp_path / step, again.append)
        assert step not in again and again[-1] == "calibrated head"
        assert _equal(resumed, whole)


# Wide, so that what a product sees in it is another input than the exact one.
WIDE = ActivationRange(-900.0, 300.0)


def _problem(checkpoint: Checkpoint, rounding: Rounding) -> Problem:
    specs = _specs(checkpoint, "gptq")
    specs["model.embed_tokens.weight"] = QuantSpec(4, BLOCK, algorithm="imatrix")
    values = {given.name: WIDE for given in decoder_of(checkpoint.config).inputs}
    return Problem(specs, {}, rounding, Rounding.NONE, values, {})


def _solved(
    checkpoint: Checkpoint, sequences: list[list[int]], folder: Path, rounding: Rounding = Rounding.NONE
) -> tuple[_Kept, list[Any]]:
    kept, problem = _Kept(), _problem(checkpoint, rounding)
    return kept, solve(checkpoint.config, checkpoint.source, sequences, problem, kept, folder, lambda _: None)


def _rounded(x: Floats, rounding: Rounding) -> Floats:
    """By the definitions of each."""
    if rounding is Rounding.INT8:
        return rounded_activations(x, BLOCK)
    if rounding is Rounding.NONE:
        return x
    step = float(np.float16(1200 * 1.25 / 65535))
    step = step if step >= 1200 * 1.25 / 65535 else float(np.nextafter(np.float16(step), np.float16(np.inf)))
    return np.asarray(np.rint(x / step) * step, np.float32)


def _of_rounded(product: Callable[..., Floats], rounding: Rounding) -> Callable[..., Floats]:
    """The same product of what the bundle makes of its input."""
    return lambda linear, x: product(linear, _rounded(x, rounding))


@pytest.mark.parametrize(
    ("case", "module", "rounding"),
    [
        *(("qwen2", "mlp.down_proj", rounding) for rounding in Rounding),
        ("deepseek-v3", "self_attn.q_b_proj", Rounding.INT8),
        ("deepseek-v3", "self_attn.kv_b_proj", Rounding.INT8),
        ("deepseek-v3", "self_attn.o_proj", Rounding.INT8),
        ("deepseek-v3", "mlp.shared_experts.down_proj", Rounding.INT8),
    ],
)
def test_each_matrix_is_solved_against_what_the_rounded_layers_before_it_give(
    case: str, module: str, rounding: Rounding, tmp_path: Path
) -> None:
    """A matrix of layer 1, from the checkpoint with everything before it replaced by what was solved."""
    checkpoint, sequences = _checkpoint(case, tmp_path)
    sequences = sequences * 3
    kept, fallbacks = _solved(checkpoint, sequences, tmp_path / "work", rounding)
    assert fallbacks == [] and kept.commits == checkpoint.config.num_hidden_layers + 1
    config, source = checkpoint.config, checkpoint.source
    spec = QuantSpec(4, BLOCK, algorithm="gptq")
    changes = {t: dequantize_blocks(b, spec, source.read(t).shape[1]) for t, b in kept.blocks.items()}
    table = source.read("model.embed_tokens.weight")
    plain = QuantSpec(4, BLOCK, algorithm="imatrix")
    changes["model.embed_tokens.weight"] = dequantize_blocks(quantize_blocks(table, plain), plain, 64)
    arriving = Changed(source, changes)

    def input_of(tensors: Any) -> Floats:
        layers = [read_layer(config, tensors, k) for k in range(2)]
        if tensors is arriving:
            for layer in layers:
                setattr(layer, "product", _of_rounded(layer.product, rounding))  # noqa: B010  a method replaced
        seen = []

        def look(given: LinearInput, values: Floats) -> Floats:
            if given.name == f"model.layers.1.{module}":
                seen.append(_rounded(values, rounding) if tensors is arriving else values)
            return values

        for ids in sequences:
            x = layers[0](embed(tensors, ids))
            for half in layers[1].anatomy.sublayers:
                x = layers[1].through(half, x, look=look)
        return np.concatenate(seen)

    exact_x, x = input_of(source), input_of(arriving)
    T = np.float32(len(x))
    name = f"model.layers.1.{module}.weight"
    factor = factorize(x.T @ x / T, BLOCK, len(x))
    target = corrected_target(source.read(name), source.read(name) @ (exact_x.T @ x / T), factor)
    expected = dequantize_blocks(factor.solved(target, spec).blocks, spec, x.shape[1])
    found = changes[name]
    assert (np.abs(found - expected) <= 1e-3 * np.abs(expected).max()).mean() >= 0.97
    # The order matters: solved against the exact input the matrix is another one.
    alone = factorize(exact_x.T @ exact_x / T, BLOCK, len(x))
    other = dequantize_blocks(alone.solved(source.read(name), spec).blocks, spec, x.shape[1])
    assert (np.abs(found - other) <= 1e-3 * np.abs(other).max()).mean() < 0.9


def test_the_head_is_solved_in_slices_as_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, sequences = _checkpoint("qwen3", tmp_path)
    kept, _ = _solved(checkpoint, sequences * 3, tmp_path / "whole")
    sliced: dict[int, QuantizedBlocks] = {}

    class Slices(_Kept):
        def write(self, tensor: str, start: int, signal: float, blocks: QuantizedBlocks) -> None:
            if tensor == "lm_head.weight":
                sliced[start] = blocks
            else:
                super().write(tensor, start, signal, blocks)

    monkeypatch.setattr(decoder, "HEAD_ROWS", 40)
    problem = _problem(checkpoint, Rounding.NONE)
    solve(checkpoint.config, checkpoint.source, sequences * 3, problem, Slices(), tmp_path / "sliced")
    assert sorted(sliced) == [0, 40, 80]
    packed = np.concatenate([sliced[start].packed for start in sorted(sliced)])
    assert (packed == kept.blocks["lm_head.weight"].packed).mean() > 0.99


@pytest.mark.parametrize("tokens", [24, 400])
def test_rows_of_a_tall_matrix_are_solved_some_at_a_time_as_all_at_once(
    tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From tokens where they are few, from second moments where they are many."""
    checkpoint, _ = _checkpoint("qwen3", tmp_path)
    given, random = decoder_of(checkpoint.config).layers[0].attention.normed_input, np.random.default_rng(4)
    exact = random.standard_normal((tokens, given.width)).astype(np.float32)
    arriving = exact + 0.1 * random.standard_normal(exact.shape).astype(np.float32)
    weights = {linear.weight: checkpoint.source.read(linear.weight) for linear in given.linears}

    def solved() -> dict[str, Solved]:
        solver = InputSolver(given, _problem(checkpoint, Rounding.NONE), NUMPY, None, None)
        solver.gather(iter([(exact, arriving)]), tokens, weights)
        return solver.solved(weights)

    whole = solved()
    monkeypatch.setattr(input_solver, "rows_together", lambda _: 24)
    for name, made in solved().items():
        assert (made.blocks.packed == whole[name].blocks.packed).mean() > 0.99
        assert made.blocks.noise == pytest.approx(whole[name].blocks.noise, rel=0.01)
        assert np.isclose(made.restored, whole[name].restored, atol=1e-6).mean() > 0.99


@pytest.mark.parametrize(("tokens", "taken"), [(24, [0, 3, 5, 8, 10, 13, 15, 18, 20, 23]), (40, range(40))])
def test_a_wide_input_is_solved_from_some_tokens_evenly_spaced(
    tokens: int, taken: Sequence[int], tmp_path: Path
) -> None:
    """One of more than twice as many channels as there are tokens; they come in sequences of 7."""
    checkpoint, _ = _checkpoint("qwen3", tmp_path)
    given, random = decoder_of(checkpoint.config).layers[0].attention.normed_input, np.random.default_rng(4)
    assert 2 * 24 < given.width <= 2 * 40
    exact = random.standard_normal((tokens, given.width)).astype(np.float32)
    arriving = exact + 0.1 * random.standard_normal(exact.shape).astype(np.float32)
    weights = {linear.weight: checkpoint.source.read(linear.weight) for linear in given.linears}

    def solved(most: int, pairs: list[tuple[Floats, Floats]]) -> dict[str, Solved]:
        problem = replace(_problem(checkpoint, Rounding.NONE), wide_tokens=most)
        solver = InputSolver(given, problem, NUMPY, None, None)
        solver.gather(iter(pairs), sum(x.shape[0] for x, _ in pairs), weights)
        return solver.solved(weights)

    found = solved(10, [(exact[k : k + 7], arriving[k : k + 7]) for k in range(0, tokens, 7)])
    alone = solved(0, [(exact[list(taken)], arriving[list(taken)])])
    for name, made in found.items():
        assert (made.blocks.packed == alone[name].blocks.packed).all()


def test_a_tied_embedding_is_solved_as_the_head_that_it_is(tmp_path: Path) -> None:
    """Layers read it searched without text; what arrives at their end it serves better than if errors were weighed."""
    checkpoint, sequences = _checkpoint("qwen2-tied", tmp_path)
    config, source, table = checkpoint.config, checkpoint.source, "model.embed_tokens.weight"
    spec, sequences = QuantSpec(4, BLOCK, algorithm="gptq"), sequences * 3
    problem = replace(_problem(checkpoint, Rounding.NONE), specs=_specs(checkpoint, "gptq"))
    kept = _Kept()
    assert solve(config, source, sequences, problem, kept, tmp_path / "work") == []

    changes = {t: dequantize_blocks(b, spec, source.read(t).shape[1]) for t, b in kept.blocks.items()}
    weights = source.read(table)
    looked_up = dequantize_blocks(quantize_blocks(weights, spec), spec, config.hidden_size)
    streams = (Changed(source, changes | {table: looked_up}), source)
    arriving, exact = (np.concatenate(reference_hidden(config, tensors, sequences)) for tensors in streams)
    searched = quantize_blocks(weights, replace(spec, algorithm="imatrix"), np.square(arriving).mean(axis=0))

    logits = exact @ weights.T
    best, *_ = np.linalg.lstsq(arriving, logits, rcond=None)
    floor = np.square(arriving @ best - logits).sum()

    def lost(rows: Floats) -> float:
        return float(np.square(arriving @ rows.T - logits).sum() - floor)

    assert lost(changes[table]) < 0.9 * lost(dequantize_blocks(searched, spec, config.hidden_size))
    assert np.square(changes[table] - weights).sum() < 0.02 * np.square(weights).sum()


def test_few_tokens_and_their_products_come_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, sequences = _checkpoint("qwen2", tmp_path)
    found = []
    for pays in (True, False):
        monkeypatch.setattr(input_solver, "pays", lambda tokens, channels, rows, pays=pays: pays)
        kept, fallbacks = _solved(checkpoint, sequences, tmp_path / f"work-{pays}")
        assert fallbacks == []
        found.append(kept.blocks)
    # What differs in a last bit in one layer may fall the other way in the next.
    for tensor, blocks in ((t, b) for t, b in found[0].items() if ".0.self_attn." in t):
        other = found[1][tensor]
        shape = checkpoint.source.read(tensor).shape[1]
        ours, theirs = (dequantize_blocks(b, QuantSpec(4, BLOCK, algorithm="gptq"), shape) for b in (blocks, other))
        assert (np.abs(ours - theirs) <= 1e-3 * np.abs(theirs).max()).mean() >= 0.95, tensor


def test_a_moment_that_cannot_be_factored_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, sequences = _checkpoint("qwen2", tmp_path)

    def refuse(moment: Floats, block_size: int, tokens: float) -> None:
        raise input_solver.NotPositiveDefiniteError("the second moment of the input is not positive definite")

    monkeypatch.setattr(input_solver, "factorize", refuse)
    kept, fallbacks = _solved(checkpoint, sequences * 3, tmp_path / "work")
    assert len(fallbacks) == len(kept.blocks) == 7 * 2 + 1
    assert {fallback.reason for fallback in fallbacks} == {"the second moment of the input is not positive definite"}


def _recipe(checkpoint: Path, calibration: Path, *changes: str, target: str = "cpu") -> Recipe:
    fixed = (f"calibration={calibration}", "context_length=256", "validate={}")
    return load_recipe(target, [*fixed, *changes], str(checkpoint))


@pytest.fixture(scope="module")
def stories_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough words for stories260k's widest input."""
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    names, things = ("Lily", "Tom", "Ben", "Mia", "Sam"), ("a red ball", "a big dog", "a cat", "a cake", "the moon")
    stories = [
        f"Once upon a time, there was a little child named {name}. {name} saw {thing} in the park and was very happy. "
        f'"Can I play with {other}?" said {name}. They played all day. At the end, {name} went home to sleep.'
        for name in names
        for thing in things
        for other in things[:2]
    ]
    path.write_text("\n\n".join(stories), encoding="utf-8")
    return path


# What progress says, from the survey to the packing.
STOPS = (
    "calibrated layer 1",
    "calibrated head",
    "solved layer 0",
    "solved layer 3",
    "solved head",
    "model.norm.weight",
)


@pytest.fixture(scope="module")
def in_one_run(stories260k: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe that takes every step, and its bundle made in a single run."""
    recipe = _recipe(stories260k, stories_text, "quality=best", "bits_per_weight=6", "calibration_tokens=1500")
    steps: list[str] = []
    order = Order(recipe, tmp_path_factory.mktemp("whole") / "bundle")
    (whole,) = export_bundles([order], open_checkpoint(stories260k), progress=steps.append)
    assert set(STOPS) <= set(steps)
    return recipe, whole


@pytest.mark.parametrize("step", STOPS)
def test_an_export_stopped_anywhere_resumes_to_the_same_bytes(
    step: str, in_one_run: tuple[Recipe, Path], stories260k: Path, tmp_path: Path
) -> None:
    recipe, whole = in_one_run
    again: list[str] = []
    order = Order(recipe, tmp_path / "stopped")
    with pytest.raises(_StopError):
        export_bundles([order], open_checkpoint(stories260k), progress=_stopping_at(step))
    assert not (tmp_path / "stopped").exists()
    (resumed,) = export_bundles([order], open_checkpoint(stories260k), progress=again.append)
    # What was solved is not solved again.
    if step.startswith("solved layer"):
        assert step not in again and "solved layer 4" in again
    assert sorted(p.name for p in resumed.iterdir()) == sorted(p.name for p in whole.iterdir())
    for path in whole.iterdir():
        if not path.name.startswith("report."):
            assert (resumed / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("lost", ["data", "layout"])
def test_what_was_solved_into_other_files_is_solved_again(
    lost: str, in_one_run: tuple[Recipe, Path], stories260k: Path, tmp_path: Path
) -> None:
    recipe, whole = in_one_run
    order, partial = Order(recipe, tmp_path / "stopped"), tmp_path / "stopped.partial"
    with pytest.raises(_StopError):
        export_bundles([order], open_checkpoint(stories260k), progress=_stopping_at("solved layer 3"))
    if lost == "data":
        (partial / "model.onnx.data").unlink()
    else:
        _, *named = (partial / "journal.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        head = json.dumps({"layout": "0" * 64}) + "\n"
        (partial / "journal.jsonl").write_text(head + "".join(named), encoding="utf-8")
    again: list[str] = []
    (resumed,) = export_bundles([order], open_checkpoint(stories260k), progress=again.append)
    assert "solved layer 0" in again
    assert (resumed / "model.onnx.data").read_bytes() == (whole / "model.onnx.data").read_bytes()


def test_an_export_of_other_planned_formats_begins_anew(
    in_one_run: tuple[Recipe, Path], stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, whole = in_one_run
    order, said = Order(recipe, tmp_path / "stopped"), list[str]()
    rules = layout.planned_specs

    def earlier(*given: Any) -> dict[str, QuantSpec]:
        """The rules as an earlier state of the code may have had them."""
        return {name: replace(spec, bits=4) for name, spec in rules(*given).items()}

    with monkeypatch.context() as patched, pytest.raises(_StopError):
        patched.setattr(layout, "planned_specs", earlier)
        export_bundles([order], open_checkpoint(stories260k), progress=_stopping_at("calibrated layer 1"))
    (resumed,) = export_bundles([order], open_checkpoint(stories260k), progress=said.append)
    assert "calibrated layer 0" in said
    assert (resumed / "model.onnx.data").read_bytes() == (whole / "model.onnx.data").read_bytes()


def _bundle_kld(bundle: Path, checkpoint: Checkpoint, sequences: list[list[int]], exact: bool) -> float:
    compared, positions = Comparison(), open_positions(bundle, exact=exact)
    for ids, expected in zip(sequences, reference_logits(checkpoint.config, checkpoint.source, sequences), strict=True):
        compared.add(expected, positions.logits(ids), ids)
    return float(compared.figures().mean_kld)


def _reasoning(checkpoint: Checkpoint) -> list[list[int]]:
    return token_sequences(checkpoint, TEXT, 600, 160)


@pytest.mark.parametrize("target", list(TARGETS))
def test_folds_save_every_target(target: str, tiny_r1: Path, tmp_path: Path) -> None:
    """tiny-r1's salient channels, which rounding destroys (mean KLD .03 to .1), in each target's own form."""
    checkpoint = open_checkpoint(tiny_r1)
    text = tiny_r1 / "calibration.jsonl"
    recipe = load_recipe(f"tiny-r1-{target}", [f"calibration={text}", "calibration_tokens=512", "bits_per_weight=0"])
    bundle = export_bundle(recipe, checkpoint, tmp_path / "bundle")
    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    assert len(report["quantization"]["calibration"]["folded"]) >= 2 * checkpoint.config.num_hidden_layers
    # openvino's rule is symmetric: one level less, and no zero point.
    most = 0.008 if target == "openvino" else 0.003
    assert _bundle_kld(bundle, checkpoint, _reasoning(checkpoint), exact=True) < most


@pytest.mark.parametrize("quality", ["balanced", "best"])
def test_a_budget_is_kept_and_the_bundle_is_close_both_ways(quality: str, tiny_r1: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    recipe = load_recipe("tiny-r1-cpu", [f"quality={quality}"])
    bundle = export_bundle(recipe, checkpoint, tmp_path / "bundle")
    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    assert 4.8 < report["quantization"]["bits_per_weight"] <= 4.9
    calibration = report["quantization"]["calibration"]
    assert calibration["quality"] == quality and calibration["fallbacks"] == []
    measured = {given.name for given in decoder_of(checkpoint.config).inputs} | {"model.embed_tokens"}
    assert set(calibration["divergences"]) == measured
    most = 0.0005 if quality == "balanced" else 0.0002
    for exact in (True, False):
        assert _bundle_kld(bundle, checkpoint, _reasoning(checkpoint), exact) < most


@pytest.mark.parametrize("target", ["qnn", "vitisai"])
def test_a_budget_buys_what_the_provider_takes(
    target: str, stories260k: Path, stories_text: Path, tmp_path: Path
) -> None:
    """AMD's table has MatMulNBits of 4 bits alone; the embedding and the head run on the CPU."""
    profile = ("profile=float16",) if target == "qnn" else ()
    changes = ("quality=balanced", "bits_per_weight=7", "calibration_tokens=600", *profile)
    recipe = _recipe(stories260k, stories_text, *changes, target=target)
    bundle = export_bundle(recipe, open_checkpoint(stories260k), tmp_path / "bundle")
    graph = onnx.load(bundle / "iterator.onnx", load_external_data=False).graph
    bits = {a.i for node in graph.node if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "bits"}
    assert bits == ({4} if target == "vitisai" else {4, 8})


def test_a_budget_leaves_keys_and_values_as_wide_as_their_rule(
    stories260k: Path, stories_text: Path, tmp_path: Path
) -> None:
    """They read what q reads, whose format is bought."""
    recipe = _recipe(stories260k, stories_text, "quality=balanced", "bits_per_weight=5.6", "calibration_tokens=600")
    bundle = export_bundle(recipe, open_checkpoint(stories260k), tmp_path / "bundle")
    made = json.loads((bundle / "report.json").read_text(encoding="utf-8"))["quantization"]
    bits = {row["name"]: row["bits"] for row in made["tensors"]}
    assert {found for name, found in bits.items() if ".k_proj." in name or ".v_proj." in name} == {8}
    assert 4 in {found for name, found in bits.items() if ".q_proj." in name}
    assert made["bits_per_weight"] <= 5.6


def test_matrices_that_read_one_input_may_have_blocks_of_any_sizes(
    stories260k: Path, stories_text: Path, tmp_path: Path
) -> None:
    rules: list[Any] = [{"match": "*.k_proj", "block_size": 64}, {"match": "*.v_proj", "block_size": 16}]
    checkpoint, klds = open_checkpoint(stories260k), []
    for name, some in (("mixed", rules), ("alike", [])):
        recipe = tmp_path / f"{name}.yaml"
        asked = {"target": "cpu", "quality": "balanced", "calibration": str(stories_text), "calibration_tokens": 1500}
        asked |= {"name": name, "model": str(stories260k), "context_length": 256, "validate": {}}
        recipe.write_text(json.dumps({**asked, "quantize": [*some, {"match": "*", "block_size": 32}]}))
        bundle = export_bundle(load_recipe(str(recipe)), checkpoint, tmp_path / name)
        klds.append(_bundle_kld(bundle, checkpoint, token_sequences(checkpoint, stories_text, 400, 160), exact=True))
    assert klds[0] < 1.2 * klds[1]


def test_the_text_is_what_calibrates(stories260k: Path, stories_text: Path, tmp_path: Path) -> None:
    """Another text, another bundle; the same text, the same bytes."""
    checkpoint, other = open_checkpoint(stories260k), tmp_path / "other.txt"
    other.write_text("\n\n".join(reversed(stories_text.read_text(encoding="utf-8").split("\n\n"))), encoding="utf-8")
    made = {}
    for name, text in (("a", stories_text), ("b", stories_text), ("c", other)):
        recipe = _recipe(stories260k, text, "quality=best", "calibration_tokens=600")
        made[name] = (export_bundle(recipe, checkpoint, tmp_path / name) / "model.onnx.data").read_bytes()
    assert made["a"] == made["b"] != made["c"]


def _loud_norm(folder: Path) -> None:
    """Gains and matrices that float32 holds the square of, but not the scores of attention that they make."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"] = np.full(64, 1e18, np.float32)
    for module in ("q_proj", "k_proj"):
        tensors[f"model.layers.1.self_attn.{module}.weight"] *= 1e4
    save_file(tensors, folder / "model.safetensors")


BAD: dict[str, tuple[str | bytes | None, tuple[str, ...], str]] = {
    "no text": ("", (), "is empty"),
    "blank lines": ("\n\n  \n\n", (), "holds no text"),
    "not there": (None, (), "cannot be read"),
    "not text": (b"\xff\xfe\x00\x80" * 50, (), "is not text in UTF-8"),
    "too short": ("Once upon a time.", (), "tokens of calibration text, at least 256 are needed: name a longer text"),
    "shorter than asked": ("Once upon a time. " * 200, ("calibration_tokens=9000",), "at least 9000 are needed"),
    "unknown quality": ("x", ("quality=bets",), "quality 'bets' is unknown (did you mean 'best'?)"),
    "no budget": ("x", ("bits_per_weight=3",), "expected a budget above 4"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calibration_is_one_line(case: str, stories260k: Path, tmp_path: Path) -> None:
    content, changes, message = BAD[case]
    text, out = tmp_path / "text.txt", tmp_path / "out"
    if content is not None:
        text.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = [word for change in ("quality=balanced", "context_length=256", *changes) for word in ("--set", change)]
    words += ["--checkpoint", str(stories260k), "--calibration", str(text), "--out", str(out), "--no-validate"]
    done = called("export", "cpu", *words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_fallback_is_said_where_one_looks(stories260k: Path, stories_text: Path, tmp_path: Path) -> None:
    """Nothing arrives at a down_proj whose up_proj is zero: said in print and report."""
    shutil.copytree(stories260k, tmp_path / "silent")
    tensors = load_file(tmp_path / "silent" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:] = 0
    save_file(tensors, tmp_path / "silent" / "model.safetensors")
    words = [word for change in ("calibration_tokens=300", "context_length=256") for word in ("--set", change)]
    words += ["--checkpoint", str(tmp_path / "silent"), "--calibration", str(stories_text)]
    done = called("export", "cpu", "--quality", "best", "--no-validate", "--out", str(tmp_path / "b"), *words)
    assert done.returncode == 0, done.stderr
    assert "note: 1 matrix was searched, not solved by GPTQ: " in done.stdout
    assert "the mean second moment of the input is 0.0" in done.stdout
    page = (tmp_path / "b" / "report.html").read_text(encoding="utf-8")
    assert "layers.1.mlp.down_proj.weight was searched, not solved" in page


def test_an_activation_that_overflows_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    checkpoint, sequences = _checkpoint("llama", folder)
    _loud_norm(folder)
    checkpoint = open_checkpoint(folder)
    wish = Wish(_specs(checkpoint, "imatrix"), Rounding.NONE, Rounding.NONE, False, False)
    with np.errstate(all="ignore"), pytest.raises(Exception, match=r"layers\.1\.self_attn.* NaN or infinite"):
        survey(checkpoint.config, checkpoint.source, sequences, wish, tmp_path / "work")
