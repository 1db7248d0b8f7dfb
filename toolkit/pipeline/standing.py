"""A bundle that stands where one is to be made: whether it is the one that is asked for, and whether it may go."""

from __future__ import annotations

from dataclasses import replace

from toolkit.bundle.manifest import CalibrationText, Manifest, begin_manifest, read_manifest
from toolkit.errors import BundleError, RecipeError
from toolkit.pipeline.plan import ExportPlan
from toolkit.report.intact import report_problems
from toolkit.report.summary import validated_report


def is_made(plan: ExportPlan, text: CalibrationText | None) -> bool:
    """Whether a finished bundle of equal inputs stands at the plan's place: recipe, checkpoint, text and versions.

    Its files are there in their sizes. What stands beside the weights (config, tokenizer and the like) is hashed, and
    the checkpoint too if all else is equal, since two fine-tunes of one model have files of the same names and sizes.
    """
    try:
        found = read_manifest(plan.out)
    except BundleError:
        return False
    wanted = begin_manifest(plan.recipe, plan.precision, plan.checkpoint, plan.stop_tokens, text)
    if _request(found) != _request(wanted):
        return False
    if [(entry.name, entry.bytes) for entry in found.checkpoint] != [(e.name, e.bytes) for e in wanted.checkpoint]:
        return False
    if not all((p := plan.out / e.name).is_file() and p.stat().st_size == e.bytes for e in found.lasting_files()):
        return False
    return found.checkpoint == plan.checkpoint.source.digests()


def check_reported(plan: ExportPlan) -> None:
    """Raises BundleError for a finished bundle whose report is not as it was written: it would be kept as if whole."""
    if problem := next(report_problems(plan.out, read_manifest(plan.out)), None):
        raise BundleError(f"{problem}, or replace the bundle with --force")


def _request(manifest: Manifest) -> Manifest:
    """What was asked for, apart from what it was asked of and what became of it."""
    return replace(manifest, checkpoint=(), files=(), compiled=None, changed=(), calibrated_on=None)


def check_replaceable(plan: ExportPlan) -> None:
    """Raises RecipeError for a validated bundle of another request: its figures took long and would be lost."""
    if validated_report(plan.out):
        raise RecipeError(
            f"{plan.out} is a validated bundle of another recipe, checkpoint or version: name another --out, or "
            "replace it with --force"
        )
