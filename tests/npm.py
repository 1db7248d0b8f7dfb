"""Tests that need libraries of npm."""

from __future__ import annotations

import shutil

import pytest


def npm_or_skip() -> str:
    """Returns npm's program; the test is skipped where Node or npm is missing."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("Node and npm are not on the path")
    return npm
