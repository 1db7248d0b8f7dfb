"""Checkpoints and bundles the tests share."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_r1() -> Path:
    return ROOT / "models" / "tiny-r1"


@pytest.fixture(scope="session")
def stories260k() -> Path:
    return ROOT / "tests" / "data" / "stories260k"


@pytest.fixture(scope="session")
def test_questions() -> list[dict[str, str]]:
    text = (ROOT / "models" / "tiny-r1" / "arithmetic.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
