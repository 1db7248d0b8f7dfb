"""Experts over Dask's workers: to the bit what they make without any, on any number of them, and when one is lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.random_models import CASES, make_checkpoint
from toolkit.calibrate import expert_pieces
from toolkit.calibrate.expert_pieces import rounded_elsewhere
from toolkit.calibrate.input_solver import Problem
from toolkit.calibrate.layer_matrices import LayerMatrices
from toolkit.calibrate.survey import Survey, Wish, survey
from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.opened import Checkpoint, synthetic_checkpoint
from toolkit.checkpoint.sublayers import Moe
from toolkit.device.arrays import NUMPY
from toolkit.device.fitting import Fitting, Pool
from toolkit.pipeline.export import Order, export_planned, plan_exports
from toolkit.quant.activations import Rounding
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec
from toolkit.quant.formats import planned_specs
from toolkit.quant.ranges import ActivationRange
from toolkit.recipe import Recipe, load_recipe, sized
from toolkit.reference.decoder import read_layer
from toolkit.reference.shared import share_layer
from toolkit.target import CPU_FORM
from toolkit.workers.pool import Here, open_pool

pytest.importorskip("distributed")
Floats = NDArray[np.float32]
# The router of one has shared experts and groups, that of the other chooses some among all.
FAMILIES = ["deepseek-v3", "qwen3-moe"]


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    with open_pool("2") as pool:
        assert pool
        yield pool


@pytest.fixture(params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    make_checkpoint(*CASES[request.param], tmp_path / "checkpoint")
    return synthetic_checkpoint(tmp_path / "checkpoint")


@pytest.fixture(autouse=True)
def few_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups of experts, one after the other."""
    monkeypatch.setattr(expert_pieces, "_OUT", 20_000)


def recipe(quality: str) -> Recipe:
    small = replace(load_recipe("qwen3-30b-a3b-cpu"), name="small", context_length=64)
    return replace(small, quantize=sized(small.quantize, parameters=0), quality=quality, calibration_tokens=512)


def exported(checkpoint: Checkpoint, quality: str, out: Path, pool: Pool | None) -> bytes:
    """The data of a bundle that a pool helped to make."""
    plans = plan_exports([Order(recipe(quality), out)], checkpoint)
    (bundle,) = export_planned(plans, fitting=Fitting(NUMPY, pool=pool))
    (data,) = bundle.glob("*.data")
    return data.read_bytes()


def test_a_survey_sees_the_same_with_workers_and_without(checkpoint: Checkpoint, two: Pool, tmp_path: Path) -> None:
    """The stream too: who adds up experts in another order, or takes one's output for another's, changes its bits."""
    config, texts = checkpoint.config, np.random.default_rng(1).integers(3, 96, (2, 200)).tolist()
    wish = Wish(planned_specs(config, recipe("best"), CPU_FORM), Rounding.INT8, Rounding.INT8, True, False)

    def surveyed(name: str, pool: Pool | None) -> Survey:
        fitting = Fitting(NUMPY, pool=pool)
        return survey(config, checkpoint.source, texts, wish, tmp_path / name, fitting=fitting)

    alone, there = surveyed("alone", None), surveyed("two", two)
    assert alone.inputs.keys() == there.inputs.keys()
    for name, facts in alone.inputs.items():
        np.testing.assert_array_equal(there.inputs[name].importance, facts.importance, name)
        assert (there.inputs[name].values, there.inputs[name].tokens) == (facts.values, facts.tokens), name
    assert any(facts.tokens for facts in alone.inputs.values())
    ends = [(tmp_path / name / f"hidden-{config.num_hidden_layers}.f32").read_bytes() for name in ("alone", "two")]
    assert ends[0] == ends[1]


class Kept:
    """Keeps what is written, in order."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, QuantizedBlocks]] = []

    def write(self, tensor: str, start: int, signal: float, blocks: QuantizedBlocks) -> None:
        assert start == 0
        self.rows.append((tensor, signal, blocks))


@pytest.mark.parametrize("quality", ["balanced", "best"])
def test_rounded_experts_are_to_the_bit_what_they_are_without_workers(
    checkpoint: Checkpoint, two: Pool, quality: str
) -> None:
    config, source, generator = checkpoint.config, checkpoint.source, np.random.default_rng(7)
    specs: dict[str, QuantSpec] = planned_specs(config, recipe(quality), CPU_FORM)
    k = config.num_hidden_layers - 1
    moe = decoder_of(config).layers[k].mlp
    assert isinstance(moe, Moe)
    columns = {linear.weight: linear.in_features for given in moe.inputs for linear in given.linears}
    importance = {name: generator.uniform(0.5, 2, width).astype(np.float32) for name, width in columns.items()}
    values = {given.name: ActivationRange(-1.0, 1.0) for given in decoder_of(config).inputs}
    problem = Problem(specs, importance, Rounding.INT8, Rounding.INT8, values, {}, 2)
    normed = generator.standard_normal((400, config.hidden_size)).astype(np.float32)
    made, kept = list[Floats](), [Kept(), Kept()]
    for pool, writer in zip((None, two), kept, strict=True):
        layer = read_layer(config, source, k)
        matrices = LayerMatrices(layer, source, problem, writer)
        for given in moe.inputs:
            matrices.rounded.solved |= {linear.module: given for linear in given.linears}
        if pool:
            shared = share_layer(config, source, k)
            matrices.rounded.elsewhere = rounded_elsewhere(pool, shared, problem, writer, matrices.fallbacks)
        made.append(matrices.rounded.experts(moe, normed, matrices.by_routed))
        assert not matrices.fallbacks
    np.testing.assert_array_equal(made[1], made[0])
    assert bool(kept[0].rows) == (quality == "best") and len(kept[0].rows) == len(kept[1].rows)
    for (name, signal, blocks), (other, its, theirs) in zip(kept[0].rows, kept[1].rows, strict=True):
        assert (name, signal, blocks.noise) == (other, its, theirs.noise)
        np.testing.assert_array_equal(theirs.packed, blocks.packed)
        np.testing.assert_array_equal(theirs.scales, blocks.scales)


class Dying:
    """A pool whose first process to get a rounded expert dies of it."""

    def __init__(self, pool: Pool, mark: Path) -> None:
        self._pool, self._mark = pool, mark

    @property
    def here(self) -> int:
        return self._pool.here

    @property
    def behind(self) -> Pool:
        return Dying(self._pool.behind, self._mark)

    def map(
        self, work: Callable[[Any, Any], Any], shared: Any, pieces: Sequence[Any], costs: Sequence[float] | None = None
    ) -> list[Any]:
        return self._pool.map(dying, (work, shared, self._mark), pieces, costs)

    def begin(self, work: Callable[[Any, Any], Any], shared: Any, piece: Any) -> Callable[[], Any]:
        return self._pool.begin(dying, (work, shared, self._mark), piece)


def dying(given: tuple[Callable[[Any, Any], Any], Any, Path], piece: Any) -> Any:
    """What the work makes of a piece, unless that is the first rounded expert of all."""
    work, shared, mark = given
    if work.__name__ == "_rounded_expert" and not mark.exists():
        mark.touch()
        os._exit(1)
    return work(shared, piece)


@pytest.mark.parametrize(
    ("checkpoint", "quality"), list(zip(FAMILIES, ["best", "balanced"], strict=True)), indirect=["checkpoint"]
)
def test_an_export_with_experts_has_the_same_bytes_on_any_number_of_workers(
    checkpoint: Checkpoint, two: Pool, quality: str, tmp_path: Path
) -> None:
    """And where a worker is lost while it has experts."""
    made = [exported(checkpoint, quality, tmp_path / name, pool) for name, pool in (("two", two), ("here", Here()))]
    with open_pool("1") as one:
        made.append(exported(checkpoint, quality, tmp_path / "one", one))
    mark = tmp_path / "died"
    made.append(exported(checkpoint, quality, tmp_path / "lost", Dying(two, mark)))
    assert mark.exists()
    assert made[0] and [data == made[0] for data in made] == [True] * 4
