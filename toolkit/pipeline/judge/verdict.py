"""Which thresholds a bundle is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from toolkit.bundle.manifest import Manifest
from toolkit.report.summary import section_of

_FP32_THRESHOLDS: Final = {"max_abs_logit_error": 1e-3, "accuracy_drop": 0.005}


def thresholds(manifest: Manifest, report: Mapping[str, Any]) -> dict[str, float]:
    """The recipe's, or those of an unquantized bundle; what was left out on request is not checked, and said to be."""
    wanted = _FP32_THRESHOLDS if manifest.precision == "fp32" else manifest.recipe.validate
    left_out = {section for section in ("tasks", "speed", "simulator") if section not in report}
    if "tasks" not in report.get("simulator", {}):
        left_out.add("simulator.tasks")
    return {name: limit for name, limit in wanted.items() if section_of(name) not in left_out}
