"""Work over Dask's workers: the same bytes on any number of them, and what is said of those that are lost or differ."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import toolkit
from tests.command_line import called
from toolkit.calibrate import pieces, side_by_side
from toolkit.calibrate.side_by_side import InputFactor, solve_side_by_side
from toolkit.errors import MachineError
from toolkit.quant.blockwise import QuantSpec
from toolkit.quant.gptq import factorize
from toolkit.quant.gptq_tokens import factorize_tokens
from toolkit.workers import pool as pools
from toolkit.workers.pool import DaskPool, Here, open_pool

distributed = pytest.importorskip("distributed")
SPEC = QuantSpec(4, 32, algorithm="gptq")


@pytest.fixture(scope="module")
def two() -> Iterator[DaskPool]:
    with open_pool("2") as pool:
        assert isinstance(pool, DaskPool)
        yield pool


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


def wrong(shared: None, piece: int) -> int:
    """Fails as work itself may."""
    raise ValueError(f"piece {piece}")


@pytest.mark.parametrize("kind", ["moment", "moment of few rows", "tokens"])
def test_the_same_bytes_on_any_number_of_workers(two: DaskPool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "ROWS", 48)
    generator = np.random.default_rng(3)
    x = generator.standard_normal((200, 64)).astype(np.float32)
    arriving = x + 0.1 * generator.standard_normal(x.shape).astype(np.float32)
    weights = {name: generator.standard_normal((n, 64)).astype(np.float32) for name, n in (("gate", 96), ("up", 70))}
    products = {}
    if kind == "tokens":
        shared = InputFactor(factorize_tokens(x, arriving, SPEC), None)
    else:
        cross = np.asarray(x.T @ arriving / 200, np.float32)
        factor = factorize(np.asarray(arriving.T @ arriving / 200, np.float32), 32, 200)
        if kind == "moment":
            shared = InputFactor(factor, cross)
        else:
            shared, products = InputFactor(factor, None), {name: w @ cross for name, w in weights.items()}
    specs = dict.fromkeys(weights, SPEC)
    here, there = (solve_side_by_side(pool, shared, weights, specs, products) for pool in (Here(), two))
    for name, weight in weights.items():
        assert here[name].restored.shape == weight.shape
        for found in ("packed", "scales", "zero_points"):
            np.testing.assert_array_equal(getattr(there[name].blocks, found), getattr(here[name].blocks, found))
        np.testing.assert_array_equal(there[name].restored, here[name].restored)
        assert there[name].blocks.noise == here[name].blocks.noise
    # And each row is the one that the matrix as a whole has: rows do not depend on each other.
    product = products.get("gate", None if shared.cross is None else weights["gate"] @ shared.cross)
    whole = (
        shared.factor.solved(weights["gate"], SPEC)
        if kind == "tokens"
        else shared.factor.solved(weights["gate"], SPEC, product)  # type: ignore[call-arg]
    )
    assert np.mean(whole.blocks.packed != here["gate"].blocks.packed) < 0.01


def test_an_export_has_the_same_bytes_on_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And as good a rounding as without any, whose products are of other sizes, so that ties fall elsewhere."""
    monkeypatch.setattr(pieces, "_ROWS", 48)
    made, errors = [], []
    for workers in ("1", "2", None):
        plans = toolkit.plan(
            "tiny-r1-cpu",
            quality="balanced",
            out=tmp_path / f"of-{workers}",
            changes=["bits_per_weight=0", "calibration_tokens=700"],
        )
        (bundle,) = toolkit.export(plans, workers=workers)
        (path,) = bundle.glob("*.data")
        made.append(np.fromfile(path, np.uint8))
        tensors = json.loads((bundle / "report.json").read_text(encoding="utf-8"))["quantization"]["tensors"]
        errors.append([tensor["sqnr_db"] for tensor in tensors])
    assert made[0].size and np.array_equal(made[1], made[0])
    np.testing.assert_allclose(errors[2], errors[0], atol=0.2)


def test_a_lost_worker_costs_its_tasks(two: DaskPool, tmp_path: Path) -> None:
    assert two.map(marked, str(tmp_path / "died"), range(8)) == [n * n for n in range(8)]
    assert (tmp_path / "died").exists()


def test_what_the_work_itself_raises_is_raised(two: DaskPool) -> None:
    with pytest.raises(ValueError, match="piece 0"):
        two.map(wrong, None, [0])


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
