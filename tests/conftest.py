"""Checkpoints and bundles the tests share, and the tier that each test is in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.tiers import Tiers

if TYPE_CHECKING:
    from tests.exports import Exports

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models are small: threads of BLAS would wait for each other longer than they work, and last bits depend on them.
for threads in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--measure`, which `make test-tiers` uses."""
    parser.addoption("--measure", action="store_true", help="write tests/seconds.json, which the fast tier follows")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the plugin that knows the tiers."""
    config.addinivalue_line("markers", "fast: few CPU seconds by tests/seconds.json")
    config.pluginmanager.register(Tiers(config.getoption("--measure")))


@pytest.fixture(scope="session")
def tiny_r1() -> Path:
    return ROOT / "models" / "tiny-r1"


@pytest.fixture(scope="session")
def stories260k() -> Path:
    return ROOT / "tests" / "data" / "stories260k"


@pytest.fixture(scope="session")
def exports(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exports]:
    """Bundles of tiny-r1 by target, made once and left as they are, which is looked at in the end."""
    from tests.exports import Exports

    made = Exports(tiny_r1, tmp_path_factory.mktemp("exports"))
    yield made
    assert made.spoilt() == []


@pytest.fixture(scope="session")
def test_questions() -> list[dict[str, str]]:
    text = (ROOT / "models" / "tiny-r1" / "arithmetic.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
