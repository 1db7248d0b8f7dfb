"""The ahead-of-time story: a bundle's transformer to EPContext files, beside the graphs they are made from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from toolkit import names
from toolkit.bundle.manifest import Manifest, check_unedited, read_manifest, save_manifest
from toolkit.bundle.settings import Settings, read_settings
from toolkit.bundle.stage_files import compiled_settings
from toolkit.epcontext.htp import PACKAGE, htp_version
from toolkit.epcontext.parts import CompiledPart, Part, compile_parts, part_key
from toolkit.errors import BundleError, MachineError, UnsupportedError
from toolkit.files import check_writable, file_entry, replacing, write_text
from toolkit.progress import counted
from toolkit.recipe import Recipe
from toolkit.report.sections import CompiledPartCost, NotMeasured, PartitionRow, Report, StepTime
from toolkit.report.summary import amend_report
from toolkit.report.weights import ceiling_row, compiled_rows
from toolkit.soc import SOCS, Soc
from toolkit.target import TARGETS


def compile_exported(bundle: Path, wanted: bool, progress: Callable[[str], None] = lambda _: None) -> str:
    """`compile_bundle` for a bundle fresh from its export; returns why it was not compiled, or nothing if it was or its
    target has no such step. The report says so too. Raises what `compile_bundle` raises once the compiler is here."""
    manifest = read_manifest(bundle)
    if not manifest.recipe.soc:
        return ""
    if manifest.precision == "fp32":
        wanted, left_out = False, "fp32 is for parity work"
    else:
        left_out = "left out by --no-compile"
    try:
        reason = "" if wanted else left_out
        if wanted:
            htp_version()
    except MachineError as problem:
        reason = str(problem)
    if not reason:
        compile_bundle(bundle, progress)
        return ""
    said = NotMeasured("partition.bin_bytes", f"not compiled ahead of time: {reason}")
    amend_report(bundle, lambda report: report, [said])
    return f"not compiled ahead of time: {reason}; `toolkit compile {bundle}` does it"


def is_current(bundle: Path) -> bool:
    """Whether a compiled bundle's binaries are those that the compiler installed here would make of its graphs; true
    where none were compiled, or no compiler is here to ask."""
    manifest = read_manifest(bundle)
    if not manifest.compiled:
        return True
    try:
        software = f"{PACKAGE} {htp_version()}"
    except MachineError:
        return True
    hashes = {entry.name: entry.sha256 for entry in manifest.files}
    parts = _parts(manifest.recipe, read_settings(bundle).soc_options(), hashes, software)
    return manifest.compiled == _keys(parts)


def compile_bundle(
    bundle: Path, progress: Callable[[str], None] = lambda _: None, soc: str | None = None, anew: bool = False
) -> tuple[PartitionRow, ...]:
    """Compiles what is not compiled yet, points settings, manifest and report at it; returns the report's `partition`.

    `soc` makes the bundle one for another SoC than its recipe's, `anew` takes none of its binaries for good. The work
    is done in `<bundle>.compile` and goes on there. Raises UnsupportedError for a target without a compiler,
    MachineError if the compiler is not here or the memory will not do, BundleError for what it does not take.
    """
    manifest = read_manifest(bundle)
    if edited := check_unedited(bundle):
        raise BundleError(f"{bundle}: {edited[0]}: export it again")
    check_writable(bundle)
    recipe = manifest.recipe
    if not recipe.soc:
        known = ", ".join(target.name for target in TARGETS.values() if target.soc)
        raise UnsupportedError(f"target {recipe.target} has no ahead-of-time compiler; those that have one: {known}")
    settings, hashes = read_settings(bundle), {entry.name: entry.sha256 for entry in manifest.files}
    if soc:
        recipe = replace(recipe, soc=soc)
        manifest = replace(manifest, recipe=recipe)
        settings = settings.for_soc(SOCS[soc].provider_options)
    parts = _parts(recipe, settings.soc_options(), hashes, f"{PACKAGE} {htp_version()}")
    work = bundle.with_name(bundle.name + ".compile")
    if anew or work.exists() or manifest.compiled != _keys(parts) or not _sizes_fit(bundle, manifest):
        made = compile_parts(bundle, parts, work, counted(progress, "compile"))
        _install(bundle, manifest, settings, parts, made, work)
    return amend_report(bundle, lambda report: report).partition or ()


def _keys(parts: Sequence[Part]) -> dict[str, str]:
    return {part.stages[0]: part.key for part in parts}


def _sizes_fit(bundle: Path, manifest: Manifest) -> bool:
    files = [(bundle / entry.name, entry.bytes) for entry in manifest.lasting_files()]
    return all(path.is_file() and path.stat().st_size == nbytes for path, nbytes in files)


def _parts(recipe: Recipe, options: dict[str, str], hashes: Mapping[str, str], software: str) -> list[Part]:
    """The parts a recipe plans, keyed by the files they are made from; `options` are the compiler's."""
    count = recipe.parts
    parts = []
    for index in range(count):
        stages = tuple(names.part_stage(kind, index, count) for kind in (names.CONTEXT, names.ITERATOR))
        sources = [*map(names.stage_file, stages), names.TRANSFORMER_DATA_FILE]
        if missing := [name for name in sources if name not in hashes]:
            raise BundleError(f"the manifest of {recipe.name} names no {missing[0]} to compile: export it again")
        key = part_key([hashes[name] for name in sources], options, software)
        parts.append(Part(index, count, stages, options, key))
    return parts


def _install(
    bundle: Path,
    manifest: Manifest,
    settings: Settings,
    parts: Sequence[Part],
    made: Sequence[CompiledPart],
    work: Path,
) -> None:
    """Moves finished files in and renames the settings over the old ones last: a kill leaves a bundle that runs, and
    whose manifest says whether it is whole."""
    stages, soc = [stage for part in parts for stage in part.stages], SOCS[manifest.recipe.soc]
    entries = [entry for part in made for entry in part.files]
    for entry in entries:
        if (work / entry.name).is_file():
            os.replace(work / entry.name, bundle / entry.name)
    logs = [f"== {' '.join(part.stages)}\n{_text(work / part.log)}" for part in parts]
    write_text(bundle / names.COMPILE_LOG_FILE, "\n".join(logs))
    with replacing(bundle / names.GENAI_CONFIG_FILE) as fresh:
        write_text(fresh, compiled_settings(settings, stages).text)
        named = replace(file_entry(fresh), name=names.GENAI_CONFIG_FILE)
        changed = replace(manifest.with_files((*entries, named)), compiled=_keys(parts))
        save_manifest(bundle / names.MANIFEST_FILE, changed)
    amend_report(bundle, lambda report: _described(report, bundle, parts, made, soc))
    shutil.rmtree(work)


def _described(report: Report, bundle: Path, parts: Sequence[Part], made: Sequence[CompiledPart], soc: Soc) -> Report:
    """The report with what compiling took, and what became of each stage."""
    stages = [stage for part in parts for stage in part.stages]
    ceiling = report.ceiling and tuple(ceiling_row(row.weight_bytes_per_token, soc) for row in report.ceiling)
    report = replace(report, partition=compiled_rows(report.partition or (), bundle, stages), ceiling=ceiling)
    conversion = report.conversion
    if conversion is None:
        return report
    kept = [step for step in conversion.stages if step.name != "compile"]
    earlier = sum(step.wall_s for step in conversion.stages if step.name == "compile")
    seconds = sum(part.wall_s for part in made)
    costs = (
        CompiledPartCost(part.stages, done.wall_s, done.peak_rss_bytes) for part, done in zip(parts, made, strict=True)
    )
    changed = replace(
        conversion,
        wall_s=conversion.wall_s + seconds - earlier,
        stages=(*kept, StepTime("compile", seconds)),
        compiled_parts=tuple(costs),
    )
    return replace(report, conversion=changed)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
