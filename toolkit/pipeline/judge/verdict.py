"""Which thresholds a bundle is judged by."""

from __future__ import annotations

from typing import Final

from toolkit.bundle.manifest import Manifest
from toolkit.figures import FIGURES
from toolkit.report.sections import Report

_FP32_THRESHOLDS: Final = {"max_abs_logit_error": 1e-3, "accuracy_drop": 0.005}


def thresholds(manifest: Manifest, report: Report) -> dict[str, float]:
    """The recipe's, or those of an unquantized bundle; what was left out on request is not checked, and said to be."""
    wanted = _FP32_THRESHOLDS if manifest.precision == "fp32" else manifest.recipe.validate
    left_out = {name for name in ("tasks", "speed", "simulator") if getattr(report, name) is None}
    if report.simulator is None or report.simulator.tasks is None:
        left_out.add("simulator.tasks")
    return {name: float(limit) for name, limit in wanted.items() if FIGURES[name].section not in left_out}
