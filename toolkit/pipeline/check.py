"""The legality story: settings against graphs, nodes against tables, on request stages in their vendor's software."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from toolkit.bundle.compiled import lint_compiled
from toolkit.bundle.lint import lint_bundle
from toolkit.bundle.manifest import read_manifest
from toolkit.bundle.operators import Placement, bundle_placements
from toolkit.epcontext.htp import PROVIDER
from toolkit.errors import MachineError
from toolkit.evaluate.vendors import MAX_ERROR, VendorRun, run_vendor_apart
from toolkit.graph.htp_faults import htp_faults
from toolkit.hosts.installation import read_mark
from toolkit.hosts.lint_installed import lint_installed
from toolkit.target import CPU_EP, TARGETS


@dataclass(frozen=True)
class CheckResult:
    """What `toolkit check` found: `problems`, one line each, the `stages` beside their providers' tables, and what
    became of those that were run in their vendor's software."""

    passed: bool
    problems: tuple[str, ...]
    stages: tuple[Placement, ...]
    runs: tuple[VendorRun, ...]


def check_bundle(bundle: Path, run: bool) -> CheckResult:
    """Holds a bundle's settings against its graphs and its nodes against the tables; `run` also runs its stages.

    Of a folder that `install` made it is what its host asks for, and its settings against its graphs. Raises
    BundleError for a folder that is no bundle, MachineError if the vendor's software is asked for and missing.
    """
    if read_mark(bundle):
        found = lint_installed(bundle)
        return CheckResult(not found, tuple(found), (), ())
    recipe = read_manifest(bundle).recipe
    placements = bundle_placements(bundle, recipe.target, recipe.window, recipe.parts)
    problems = lint_bundle(bundle)
    if recipe.soc and not problems:
        problems += lint_compiled(bundle, recipe.soc)
        problems += htp_faults(bundle, [row.stage for row in placements if row.execution_provider == PROVIDER])
    for placement in placements:
        problems += placement.problems
    runs = _run(bundle, recipe.target) if run else []
    problems += [line for entry in runs for line in _problems(entry)]
    return CheckResult(not problems, tuple(problems), tuple(placements), tuple(runs))


def _run(bundle: Path, target_name: str) -> list[VendorRun]:
    target = TARGETS[target_name]
    if target.accelerator.execution_provider == CPU_EP:
        raise MachineError(f"target {target_name} runs on the CPU alone: `toolkit validate` runs it")
    return run_vendor_apart(bundle, target.accelerator.execution_provider)


def _problems(run: VendorRun) -> list[str]:
    problems = []
    if not run.error <= MAX_ERROR:
        problems.append(
            f"{run.file}: {run.software} differs from the CPU by {run.error:.3g} of its spread, "
            f"expected at most {MAX_ERROR}"
        )
    elsewhere = {ep: count for ep, count in run.nodes.items() if ep == CPU_EP}
    problems += [f"{run.file}: {run.software} leaves {count} nodes to {ep}" for ep, count in elsewhere.items()]
    return problems
