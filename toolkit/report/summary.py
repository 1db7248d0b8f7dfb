"""report.json: sections measured by lower floors, the verdict over them, and what was not measured."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from toolkit import names
from toolkit.bundle.manifest import Manifest
from toolkit.errors import BundleError
from toolkit.files import write_json, write_text
from toolkit.machine import machine_facts
from toolkit.report.page import render_report

# Every section of the contract that a bundle may lack, with the reason it lacks it unless a run says better.
_OPTIONAL: Final = {
    "conversion": "the bundle was not made by this toolkit's export",
    "quantization": "the bundle was not made by this toolkit's export",
    "partition": "the bundle was not made by this toolkit's export",
    "parity": "not validated yet: run `toolkit validate`",
    "baseline": "the recipe does not ask for plain 4-bit rounding to be measured beside",
    "tasks": "the recipe names no tasks",
    "speed": "not validated yet: run `toolkit validate`",
    "simulator": "not validated yet, or the target has no simulator",
    "ceiling": "this target's memory bandwidth is not known",
}
# What measuring anew leaves as it is.
_KEPT: Final = ("conversion", "quantization", "partition", "kv_cache", "ceiling")
_AT_LEAST: Final = ("top1_agreement", "greedy_match_tokens", "accuracy", "simulator_accuracy")


def begin_report(manifest: Manifest) -> dict[str, Any]:
    """Identity, date and machine, from the bundle's manifest."""
    return {
        "schema_version": 1,
        "model": manifest.recipe.model,
        "target": manifest.recipe.target,
        "recipe": manifest.recipe.name,
        "synthetic": manifest.synthetic,
        "created": _now(),
        "machine": machine_facts(),
    }


def read_report(bundle: Path, manifest: Manifest) -> dict[str, Any]:
    """The bundle's report, redated, to be measured anew; a fresh one if it has none that can be read."""
    try:
        report = json.loads((bundle / names.REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        report = None
    fresh = begin_report(manifest)
    if not isinstance(report, dict):
        return fresh
    return {**fresh, **{key: report[key] for key in _KEPT if key in report}}


def amend_report(bundle: Path, change: Callable[[dict[str, Any]], None], reasons: Mapping[str, str]) -> dict[str, Any]:
    """The bundle's report with `change` made to it and nothing measured anew; returns it as written.

    Raises BundleError if there is none to read.
    """
    path = bundle / names.REPORT_FILE
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        absent = {entry["name"]: entry["reason"] for entry in report.pop("not_measured")}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise BundleError(f"{path} is no report that can be read: `toolkit validate {bundle}` makes it anew") from None
    change(report)
    if any(row.get("compiled") for row in report.get("partition", [])):
        absent.pop("partition.bin_bytes", None)
    return write_report(bundle, report, {**absent, **reasons})


def figures_of(report: Mapping[str, Any]) -> dict[str, float]:
    """Every figure a threshold may name: those of `parity` and `speed`, the simulator's error, and the tasks' worst.

    `accuracy_drop` is the reference's accuracy less the bundle's, the largest over the tasks.
    """
    figures = {
        key: value
        for section in ("parity", "speed")
        for key, value in report.get(section, {}).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if "simulator" in report:
        simulator = report["simulator"]
        figures["hidden_rms_error"] = simulator["hidden_rms_error"]
        if "mean_kld" in simulator:
            figures["simulator_mean_kld"] = simulator["mean_kld"]
        simulated = _of_tasks(simulator.get("tasks", []))
        figures |= {f"simulator_{name}": value for name, value in simulated.items()}
    return figures | _of_tasks(report.get("tasks", []))


def _of_tasks(tasks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    if not tasks:
        return {}
    drops = [task["reference_accuracy"] - task["accuracy"] for task in tasks if "reference_accuracy" in task]
    worst = {"accuracy": min(task["accuracy"] for task in tasks)}
    return {**worst, **({"accuracy_drop": max(drops)} if drops else {})}


def section_of(figure: str) -> str:
    """The section of the report that a figure is measured in: `tasks`, `simulator`, `simulator.tasks`, `speed` or
    `parity`."""
    if figure.startswith("simulator_accuracy"):
        return "simulator.tasks"
    if figure.startswith("accuracy"):
        return "tasks"
    if figure in ("hidden_rms_error", "simulator_mean_kld"):
        return "simulator"
    return "speed" if figure.endswith(("_s", "_bytes")) else "parity"


def judge(report: Mapping[str, Any], thresholds: Mapping[str, float]) -> dict[str, Any]:
    """The verdict. Neither no check nor a check on a figure that was not measured, which has no value, is a pass."""
    figures = figures_of(report)
    checks: list[dict[str, Any]] = []
    for name, threshold in thresholds.items():
        at_least = name in _AT_LEAST or name.endswith("_per_s")
        check = {"name": name, "relation": ">=" if at_least else "<=", "threshold": threshold, "passed": False}
        if name in figures:
            check["value"] = value = figures[name]
            check["passed"] = value >= threshold if at_least else value <= threshold
        checks.append(check)
    return {"passed": bool(checks) and all(check["passed"] for check in checks), "checks": checks}


def write_report(bundle: Path, report: Mapping[str, Any], reasons: Mapping[str, str] | None = None) -> dict[str, Any]:
    """report.json and report.html; returns the report as written.

    Sections that are absent are named in `not_measured` with their reason; `reasons` may name single figures too.
    """
    given = {**_OPTIONAL, **(reasons or {})}
    absent = [{"name": name, "reason": reason} for name, reason in given.items() if name not in report]
    whole = {**report, "not_measured": absent}
    write_json(bundle / names.REPORT_FILE, whole)
    write_text(bundle / names.REPORT_PAGE_FILE, render_report(whole))
    return whole


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
