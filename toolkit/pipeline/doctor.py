"""The doctor's story: what this machine has, and what each bundle on it would run on, lacks, and is mended by."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.bundle.cache import cache_bytes
from toolkit.bundle.compiled import lint_compiled
from toolkit.bundle.lint import lint_bundle
from toolkit.bundle.manifest import Manifest, read_manifest
from toolkit.bundle.settings import read_settings
from toolkit.bundle.stage_files import compiled_stages
from toolkit.errors import BundleError, ToolkitError
from toolkit.evaluate.opens import open_apart
from toolkit.evaluate.providers import provider_is_here, providers
from toolkit.files import disk_errors
from toolkit.machine import Machine, free_memory_bytes, this_machine
from toolkit.pipeline.bandwidth import memory_bandwidth
from toolkit.pipeline.catalogue_bundles import bundle_folders
from toolkit.pipeline.catalogue_row import runs_on
from toolkit.pipeline.compile import compile_bundle, is_current
from toolkit.pipeline.place import followed, held
from toolkit.report.intact import report_problems
from toolkit.target import CPU_EP, TARGETS, Stage

# What decides whether a bundle opens.
_RUNTIMES: Final = ("onnxruntime", "onnxruntime_genai")


@dataclass(frozen=True)
class ProviderState:
    """An execution provider, whether it is here with its device, the version of its package if that is installed, and
    what to install."""

    execution_provider: str
    device: str
    here: bool
    version: str | None = None
    install: str | None = None


@dataclass(frozen=True)
class Ailment:
    """One thing wrong with a bundle, and the command that mends it; `compiles` where that compiles its graphs anew."""

    problem: str
    command: str
    compiles: bool = False


@dataclass(frozen=True)
class BundleState:
    """A bundle, what it would run on here, the packages that are others than it was made with, what is wrong, and of
    what was wrong what `--fix` has mended, or why it could not."""

    path: str
    runs_on: str
    recipe: str | None = None
    changed: tuple[str, ...] = ()
    ailments: tuple[Ailment, ...] = ()
    mended: tuple[str, ...] = ()
    not_mended: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What `toolkit doctor` found; it passed where no bundle has an ailment."""

    passed: bool
    machine: Machine
    memory_free_bytes: int
    disk_free_bytes: int
    memory_bytes_per_s: float
    providers: tuple[ProviderState, ...]
    bundles: tuple[BundleState, ...]


def diagnose(places: Sequence[Path], fix: bool = False, progress: Callable[[str], None] = lambda _: None) -> Diagnosis:
    """Looks at the machine and at each bundle at and below the places, which may be missing.

    A bundle that was made with another onnxruntime or onnxruntime-genai is opened once, in a process of its own. With
    `fix` binaries that no longer fit are compiled anew from the graphs beside them.
    """
    machine = this_machine()
    bundles = tuple(_bundle_state(folder, machine) for folder in bundle_folders(places))
    if fix:
        bundles = tuple(_mended(state, machine, progress) for state in bundles)
    return Diagnosis(
        passed=not any(bundle.ailments for bundle in bundles),
        machine=machine,
        memory_free_bytes=free_memory_bytes(),
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        memory_bytes_per_s=memory_bandwidth(anew=True).bytes_per_s,
        providers=(ProviderState(CPU_EP, "cpu", True), *(_provider_state(row) for row in providers())),
        bundles=bundles,
    )


def _provider_state(row: Stage) -> ProviderState:
    here = provider_is_here(str(row.provider))
    return ProviderState(row.execution_provider, row.device, here, _version(row.package), None if here else row.package)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package.partition(" ")[0])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def _bundle_state(bundle: Path, machine: Machine) -> BundleState:
    try:
        manifest = read_manifest(bundle)
    except BundleError as problem:
        return BundleState(str(bundle), "nothing", ailments=(Ailment(str(problem), f"toolkit verify {bundle}"),))
    changed = tuple(
        f"{name.replace('_', '-')} {manifest.versions[name]} to {machine.versions.get(name, 'none')}"
        for name in _RUNTIMES
        if name in manifest.versions and manifest.versions[name] != machine.versions.get(name)
    )
    ailments = _ailments(bundle, manifest, bool(changed))
    return BundleState(str(bundle), _runs_on(bundle, manifest), manifest.recipe.name, changed, tuple(ailments))


def _mended(state: BundleState, machine: Machine, progress: Callable[[str], None]) -> BundleState:
    """The bundle's state once its binaries were compiled anew, where that is what it needs."""
    bundle, mends = Path(state.path), tuple(row.problem for row in state.ailments if row.compiles)
    if not mends:
        return state
    try:
        with disk_errors(bundle), held([bundle]):
            compile_bundle(followed(bundle), progress, anew=True)
    except ToolkitError as problem:
        return replace(state, not_mended=str(problem))
    return replace(_bundle_state(bundle, machine), mended=mends)


def _runs_on(bundle: Path, manifest: Manifest) -> str:
    """The execution provider, or why it is not that."""
    target = TARGETS[manifest.recipe.target]
    try:
        settings = read_settings(bundle)
        cache = cache_bytes(bundle, settings, settings.max_length)
    except BundleError:
        return "nothing, as it is"
    words, runs = runs_on(target, sum(entry.bytes for entry in manifest.files), cache)
    provider = target.accelerator.execution_provider
    return provider if runs else f"no {provider}: {words}"


def _ailments(bundle: Path, manifest: Manifest, changed: bool) -> list[Ailment]:
    """What is wrong, with the command that mends it: files first, for nothing else can be said of a bundle without."""
    again, compiled = f"toolkit export {_source(manifest)} --out {bundle} --force", f"toolkit compile {bundle}"
    if lost := _lost(bundle, manifest):
        anew = all(names.is_compilers(name) for name in lost)
        problem = f"{lost[0]} is missing or has another size"
        return [Ailment(problem, compiled, True) if anew else Ailment(problem, again)]
    try:
        if found := [Ailment(problem, again) for problem in lint_bundle(bundle)]:
            return found
        found = [Ailment(line, compiled, True) for line in _compiled_problems(bundle, manifest)]
        if changed:
            open_apart(bundle, None)
    except ToolkitError as problem:
        return [Ailment(str(problem), again)]
    return found + [Ailment(line, f"toolkit validate {bundle}") for line in report_problems(bundle, manifest)]


def _lost(bundle: Path, manifest: Manifest) -> list[str]:
    """The files that are not there as they were made, those first that only an export makes again."""
    files = {Path(entry.name).name: entry.bytes for entry in manifest.lasting_files()}
    lost = [name for name, size in files.items() if not (bundle / name).is_file() or _size(bundle / name) != size]
    return sorted(lost, key=names.is_compilers)


def _size(path: Path) -> int:
    return path.stat().st_size


def _compiled_problems(bundle: Path, manifest: Manifest) -> list[str]:
    """What no longer fits of the binaries that were compiled ahead of time."""
    found = []
    if compiled_stages(read_settings(bundle)) and manifest.recipe.soc:
        try:
            found = lint_compiled(bundle, manifest.recipe.soc)
        except BundleError as problem:
            return [str(problem)]
    if not found and not is_current(bundle):
        found = ["its binaries are another compiler's than the one here"]
    return found


def _source(manifest: Manifest) -> str:
    """The recipe to make a bundle of again: its name, or its target with the checkpoint where it has no recipe."""
    recipe = manifest.recipe
    return recipe.name if recipe.facts() else f"{recipe.target} --checkpoint {recipe.model}"
