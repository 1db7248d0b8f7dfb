"""Work over Dask's workers: the same bytes on any number of them, and what is said of those that are lost or differ."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import toolkit
from tests.command_line import called
from tests.mapped_memory import ON_GLIBC, mapped_for_an_array
from toolkit.calibrate import pieces, side_by_side
from toolkit.calibrate.pieces import Floats, SharedRows, each_by_rows, factored
from toolkit.calibrate.side_by_side import InputFactor, MatrixRows, row_pieces, solve_side_by_side
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.checkpoint.remembered import RememberedWeights
from toolkit.device.arrays import NUMPY
from toolkit.device.fitting import Fitting
from toolkit.errors import CheckpointError, MachineError
from toolkit.pipeline.export import export_planned
from toolkit.pipeline.judge import Effort, judge_bundle
from toolkit.quant.blockwise import QuantSpec, dequantize_blocks
from toolkit.quant.gptq import factorize
from toolkit.quant.gptq_tokens import factorize_tokens
from toolkit.reference.shared import SharedLayer, share_layer
from toolkit.workers import pool as pools
from toolkit.workers.pool import DaskPool, Here, dealt, open_pool

distributed = pytest.importorskip("distributed")
SPEC = QuantSpec(4, 32, algorithm="gptq")
EFFORT = Effort(tokens=700, examples=9, max_new_tokens=4, speed=False, baseline=True)


@pytest.fixture(scope="module")
def two() -> Iterator[DaskPool]:
    with open_pool("2") as pool:
        assert isinstance(pool, DaskPool)
        yield pool


class Rows:
    """Matrices in memory, as a checkpoint gives rows of them."""

    def __init__(self, matrices: dict[str, NDArray[np.float32]]) -> None:
        self._matrices = matrices

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        return self._matrices[name][start:stop]


def marked(shared: str, piece: int) -> int:
    """Ends its process the first time that it is asked for 3, and tells the square."""
    if piece == 3 and not Path(shared).exists():
        Path(shared).touch()
        os._exit(1)
    return piece * piece


def slow(shared: float, piece: int) -> int:
    """Takes its time."""
    time.sleep(shared)
    return piece


def process(shared: float, piece: int) -> int:
    """Takes its time, and tells who did."""
    time.sleep(shared)
    return os.getpid()


def wrong(shared: None, piece: int) -> int:
    """Fails as work itself may."""
    raise ValueError(f"piece {piece}")


@ON_GLIBC
def test_a_worker_keeps_the_memory_of_arrays_that_are_gone(two: DaskPool) -> None:
    """What is mapped for an array alone goes back to the system with it, and is cleared anew for the next."""
    assert two.map(mapped_for_an_array, 16 << 20, [0]) == [0]


@pytest.mark.parametrize("kind", ["moment", "moment of few rows", "tokens"])
def test_the_same_bytes_on_any_number_of_workers(two: DaskPool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "ROWS", 48)
    generator = np.random.default_rng(3)
    x = generator.standard_normal((200, 64)).astype(np.float32)
    arriving = x + 0.1 * generator.standard_normal(x.shape).astype(np.float32)
    weights = {name: generator.standard_normal((n, 64)).astype(np.float32) for name, n in (("gate", 96), ("up", 70))}
    rows, products = Rows(weights), {}
    if kind == "tokens":
        shared = InputFactor(factorize_tokens(x, arriving, SPEC), None, 0, rows)
    else:
        cross = np.asarray(x.T @ arriving / 200, np.float32)
        factor = factorize(np.asarray(arriving.T @ arriving / 200, np.float32), 32, 200)
        if kind == "moment":
            shared = InputFactor(factor, factor.whitening(cross), 0, rows)
        else:
            shared, products = InputFactor(factor, None, 0, rows), {name: w @ cross for name, w in weights.items()}
    matrices = [MatrixRows(name, 0, len(weight), SPEC, products.get(name)) for name, weight in weights.items()]
    here, there = (solve_side_by_side(pool, shared, matrices) for pool in (Here(), two))
    for ours, theirs, weight in zip(here, there, weights.values(), strict=True):
        assert dequantize_blocks(ours, SPEC, 64).shape == weight.shape
        for found in ("packed", "scales", "zero_points"):
            np.testing.assert_array_equal(getattr(theirs, found), getattr(ours, found))
        assert theirs.noise == ours.noise
    # And each row is the one that the matrix as a whole has: rows do not depend on each other.
    product = products.get("gate", weights["gate"] @ cross if kind == "moment" else None)
    whole = (
        shared.factor.solved(weights["gate"], SPEC)
        if kind == "tokens"
        else shared.factor.solved(weights["gate"], SPEC, product)  # type: ignore[call-arg]
    )
    assert np.mean(whole.blocks.packed != here[0].packed) < 0.01
    # What the other processes make of blocks is what the solver made, to the bit.
    np.testing.assert_array_equal(dequantize_blocks(whole.blocks, SPEC, 64), whole.restored)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 896, 4864, 151936])
def test_rows_are_in_pieces_as_large_as_each_other(count: int) -> None:
    found = row_pieces(count)
    sizes = [some.stop - some.start for some in found]
    assert [k for some in found for k in range(some.start, some.stop)] == list(range(count))
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= side_by_side.ROWS
    assert len(found) == -(-count // side_by_side.ROWS)


@pytest.mark.parametrize("costs", [[1.0] * 6, [1.0] * 13, [1.0], [*range(1, 36), *[70] * 6], [3.0, 1, 1, 1]])
def test_pieces_are_dealt_so_that_no_worker_waits_for_more_than_one(costs: list[float]) -> None:
    """Two workers that take groups in turns, two each."""
    groups = dealt(costs, min(len(costs), 4))
    assert sorted(place for group in groups for place in group) == list(range(len(costs)))
    loads = [sum(costs[place] for group in groups[worker::2] for place in group) for worker in (0, 1)]
    assert max(loads) - min(loads) <= max(costs)


def sums(shared: float, piece: tuple[Floats, ...]) -> Floats:
    """Treats each row by itself."""
    x, y = piece
    return shared * x + y


def test_batches_by_rows_come_back_as_they_were_given(two: DaskPool) -> None:
    generator = np.random.default_rng(9)
    batches = [tuple(generator.standard_normal((2, n, 5)).astype(np.float32)) for n in (300, 7, 513)]
    expected = [sums(0.5, batch) for batch in batches]
    for pool in (None, Here(), two):
        found = list(each_by_rows(pool, sums, 0.5, iter(batches)))
        assert len(found) == 3
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("tokens", [300, 24])
def test_a_factor_made_in_pieces_is_that_of_the_whole_moment(
    two: DaskPool, tiny_r1: Path, tokens: int, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few tokens the other products are less work than the factor, and made beside it."""
    monkeypatch.setattr(side_by_side, "ROWS", 48)
    opened, generator, called = open_checkpoint(tiny_r1), np.random.default_rng(5), list[int]()
    tensor = "model.layers.0.mlp.down_proj.weight"
    weight = opened.source.read(tensor)
    x, half = generator.standard_normal((tokens, weight.shape[1])).astype(np.float32), tokens // 2
    arriving = x + 0.1 * generator.standard_normal(x.shape).astype(np.float32)
    rows = SharedRows(share_layer(opened.config, opened.source, 0), {tensor: weight.shape[0]}) if few else None
    given = [x[:half], x[half:]], [arriving[:half], arriving[half:]], rows, {32}
    factor, made = factored(two, *given, lambda: called.append(1))
    alone, same = factored(Here(), *given, lambda: None)
    assert called == [1] and np.array_equal(made, same) and np.array_equal(factor.upper, alone.upper)
    exact, other = x.astype(np.float64), arriving.astype(np.float64)
    whole = factorize(np.asarray(other.T @ other / tokens, np.float32), 32, tokens)
    np.testing.assert_allclose(factor.upper, whole.upper, atol=1e-4)
    cross = exact.T @ other / tokens
    expected = weight @ cross if few else whole.whitening(cross.astype(np.float32))
    np.testing.assert_allclose(made, expected, atol=1e-3)


def test_an_export_has_the_same_bytes_and_figures_on_any_number_of_workers(
    two: DaskPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And as good a rounding as without any, whose products are of other sizes, so that ties fall elsewhere."""
    monkeypatch.setattr(side_by_side, "ROWS", 48)
    made, errors, figures = [], [], []
    for name, pool in (("none", None), ("here", Here()), ("two", two)):
        plans = toolkit.plan(
            "tiny-r1-cpu",
            quality="balanced",
            out=tmp_path / name,
            changes=["bits_per_weight=0", "calibration_tokens=400"],
        )
        fitting = Fitting(NUMPY, pool=pool)
        (bundle,) = export_planned(plans, lambda _: None, fitting=fitting)
        (path,) = bundle.glob("*.data")
        made.append(np.fromfile(path, np.uint8))
        tensors = json.loads((bundle / "report.json").read_text(encoding="utf-8"))["quantization"]["tensors"]
        errors.append([tensor["sqnr_db"] for tensor in tensors])
        # The first bundle each time: what differs is who judges it.
        report = judge_bundle(tmp_path / "none", plans[0].opened, EFFORT, lambda _: None, fitting)
        assert report.parity and report.baseline and report.tasks and report.parity.weights_alone
        figures.append([replace(report.parity, bytes_read=None), report.baseline, report.tasks])
    assert made[1].size and np.array_equal(made[2], made[1])
    np.testing.assert_allclose(errors[1], errors[0], atol=0.2)
    assert figures[2] == figures[1]
    alone, there = (row[0] for row in figures[:2])
    assert there.mean_kld == pytest.approx(alone.mean_kld, rel=1e-3)
    assert there.weights_alone.mean_kld == pytest.approx(alone.weights_alone.mean_kld, rel=1e-3)
    assert (there.tokens, there.greedy_match_tokens) == (alone.tokens, alone.greedy_match_tokens)
    assert figures[1][1].mean_kld == pytest.approx(figures[0][1].mean_kld, rel=1e-3)
    assert figures[1][2] == figures[0][2]


def test_a_checkpoint_travels_as_its_place(tiny_r1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_r1.parent)
    opened = open_checkpoint(Path(tiny_r1.name))
    remembered = RememberedWeights(opened.source)
    tensor = opened.source.names()[0]
    expected = remembered.read(tensor)
    sent = pickle.dumps(share_layer(opened.config, remembered, 0))
    assert len(sent) < expected.nbytes / 4
    monkeypatch.chdir(tiny_r1.parent.parent)
    np.testing.assert_array_equal(pickle.loads(sent).read(tensor), expected)


def test_a_path_that_a_worker_cannot_read_is_one_line(two: DaskPool, tiny_r1: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_r1, tmp_path / "gone"))
    opened = open_checkpoint(folder)
    x = np.zeros((4, opened.config.hidden_size), np.float32)

    def given() -> tuple[SharedLayer, list[tuple[NDArray[np.float32], tuple[int, ...]]]]:
        return share_layer(opened.config, opened.source, 0), [(x, (4,))]

    for path in folder.glob("*.safetensors"):
        os.truncate(path, 4096)
    with pytest.raises(
        CheckpointError, match=r"the worker tcp://\S+: \S+gone\S+ ends at \d+, expected .*finished layers are kept"
    ):
        two.map(pieces.through, *given())
    shutil.rmtree(folder)
    said = r"the worker tcp://\S+ cannot open \S+gone\S+: No such file or directory: .*finished layers are kept"
    with pytest.raises(MachineError, match=said):
        two.map(pieces.through, *given())


def test_a_lost_worker_costs_its_tasks(two: DaskPool, tmp_path: Path) -> None:
    assert two.map(marked, str(tmp_path / "died"), range(8)) == [n * n for n in range(8)]
    assert (tmp_path / "died").exists()


def test_what_is_begun_has_a_worker_to_itself(two: DaskPool) -> None:
    two._client.wait_for_workers(2, timeout=30)
    everyone = set(two.map(process, 0.1, range(8)))
    ended = two.begin(process, 1.0, 0)
    others = set(two.map(process, 0.01, range(8)))
    assert len(everyone) == 2 and others == everyone - {ended()}
    # And afterwards it is one of them again.
    assert set(two.map(process, 0.1, range(8))) == everyone


def test_what_is_begun_by_the_only_worker_comes_first() -> None:
    with open_pool("1") as pool:
        assert pool
        ended = pool.begin(process, 0.1, 0)
        assert pool.map(process, 0.0, [1]) == [ended()]


def test_what_the_work_itself_raises_is_raised(two: DaskPool) -> None:
    with pytest.raises(ValueError, match="piece 0"):
        two.map(wrong, None, [0])
    with pytest.raises(ValueError, match="piece 1"):
        two.begin(wrong, None, 1)()


def test_a_worker_of_another_version_is_one_line(two: DaskPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "package_versions", lambda: {"toolkit": "9", "numpy": np.__version__})
    with pytest.raises(MachineError, match=r"the worker tcp://\S+ has toolkit \S+, this process 9: install the same"):
        DaskPool(two._client, "these")


def test_no_scheduler_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (
        pytest.raises(MachineError, match=r"no Dask scheduler answers at 127\.0\.0\.1:9:"),
        open_pool("127.0.0.1:9", 1.0),
    ):
        pass
    done = called("export", "tiny-r1-cpu", "--workers", "2", "--device", "torch", "--out", str(tmp_path / "x"))
    assert done.returncode == 2 and "--workers compute on numpy" in done.stderr


def test_a_scheduler_that_goes_is_one_line() -> None:
    cluster = distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0", silence_logs=50
    )
    with distributed.Client(cluster.scheduler_address, timeout=5) as client:
        pool = DaskPool(client, "that", 1.0)
        assert pool.map(slow, 0.0, [1, 2]) == [1, 2]
        cluster.close()
        with pytest.raises(MachineError, match="the Dask scheduler of that is gone: finished layers are kept"):
            pool.map(slow, 0.0, [1, 2])


def test_no_worker_is_one_line() -> None:
    with (
        distributed.LocalCluster(
            n_workers=0, processes=False, dashboard_address="127.0.0.1:0", silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
        pytest.raises(MachineError, match="that has no worker: start one with `dask worker`"),
    ):
        DaskPool(client, "that", 0.5)
