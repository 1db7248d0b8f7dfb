"""A bundle that stands where one is to be made: whether it is the one that is asked for, and whether it may go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from toolkit import names
from toolkit.bundle.manifest import CalibrationText, Manifest, begin_manifest, read_manifest
from toolkit.errors import BundleError, RecipeError
from toolkit.files import file_sha256
from toolkit.pipeline.plan import ExportPlan
from toolkit.report.summary import validated_report


def is_made(plan: ExportPlan, text: CalibrationText | None, side_files: Sequence[Path]) -> bool:
    """Whether a finished bundle of equal inputs stands at the plan's place: recipe, checkpoint, text and versions.

    Its files are there in their sizes, and of `side_files` (config, tokenizer and the like) none is younger. The
    checkpoint is hashed if all else is equal, since two fine-tunes of one model have files of the same names and sizes.
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
    made_ns = (plan.out / names.MANIFEST_FILE).stat().st_mtime_ns
    whole = all((p := plan.out / e.name).is_file() and p.stat().st_size == e.bytes for e in found.files)
    if not whole or any(path.stat().st_mtime_ns > made_ns for path in side_files):
        return False
    hashes = {entry.name: entry.sha256 for entry in found.files}
    changed = {entry.name for entry in found.changed}
    copied = [path for path in side_files if path.name in hashes and path.name not in changed]
    if any(file_sha256(path) != hashes[path.name] for path in copied):
        return False
    return found.checkpoint == plan.checkpoint.source.digests()


def _request(manifest: Manifest) -> Manifest:
    """What was asked for, apart from what it was asked of and what became of it."""
    return replace(manifest, checkpoint=(), files=(), compiled=None, changed=())


def check_replaceable(plan: ExportPlan) -> None:
    """Raises RecipeError for a validated bundle of another request: its figures took long and would be lost."""
    if validated_report(plan.out):
        raise RecipeError(
            f"{plan.out} is a validated bundle of another recipe, checkpoint or version: name another --out, or "
            "replace it with --force"
        )
