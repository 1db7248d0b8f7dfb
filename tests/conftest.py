"""Checkpoints and bundles the tests share, and the tier that each test is in."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import jsonschema
import pytest

from tests.tiers import Tiers
from toolkit.files import write_json
from toolkit.report.schema import SCHEMA_FILE

if TYPE_CHECKING:
    from tests.exports import Exports
    from tests.hostile.sandbox import Sandbox

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What is measured of the machine is kept beside what tests make, not where a user has it.
os.environ.setdefault("TOOLKIT_CACHE", str(Path(__file__).resolve().parent.parent / "build" / "cache"))
# The models are small: threads of BLAS would wait for each other longer than they work, and last bits depend on them.
for threads in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
# Containers often say that no bytecode is written: hundreds of processes would compile the toolkit anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
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


@pytest.fixture(scope="session", autouse=True)
def _every_report_keeps_to_its_schema() -> Iterator[None]:
    """Every report that a test of this process writes, whatever the test is about."""
    schema: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    checker = jsonschema.Draft202012Validator(schema)

    def checked(path: Path, value: Any) -> None:
        checker.validate(value)
        write_json(path, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toolkit.report.summary.write_json", checked)
        yield


@pytest.fixture(scope="session", autouse=True)
def _small_models_wait_for_nothing() -> Iterator[None]:
    """Hundreds of exports prove something else than how they end, and small models need no second thread."""
    from tests.in_process import short_exports, single_threads

    with short_exports(), single_threads():
        yield


@pytest.fixture(scope="session")
def whole_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make test-hostile` damages, made once a session: the folder of a `Sandbox`."""
    from tests.hostile.sandbox import Sandbox
    from tests.hostile.worker import cheap

    root = tmp_path_factory.mktemp("hostile") / "sandbox"
    root.mkdir()
    with cheap(), mock.patch("tempfile.tempdir", str(root / "tmp")):
        Sandbox(root).make()
    return root


@pytest.fixture(scope="module")
def sandbox(whole_sandbox: Path) -> Iterator[Sandbox]:
    """Everything that can be damaged; commands of the module's tests run in this process, without syncing."""
    from tests.hostile.sandbox import Sandbox
    from tests.hostile.worker import cheap

    with cheap(), mock.patch("tempfile.tempdir", str(whole_sandbox / "tmp")):
        yield Sandbox(whole_sandbox)


@pytest.fixture(scope="session")
def validated_bundle(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-r1 for cpu, exported without text and validated on a few tokens and questions."""
    import toolkit

    out = tmp_path_factory.mktemp("validated") / "tiny-r1-cpu"
    (bundle,) = toolkit.export(toolkit.plan("tiny-r1-cpu", quality="fast", out=out, changes=["bits_per_weight=0"]))
    effort = toolkit.Effort(tokens=200, examples=6, max_new_tokens=60, baseline=True)
    toolkit.validate(bundle, effort=effort)
    return bundle
