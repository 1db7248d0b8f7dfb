"""The verbs of `import toolkit`: each is one call that the command line parses for and prints the result of.

What a verb needs is imported when it is called: all of it together takes longer than most of them do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolkit.checkpoint.opened import Checkpoint
    from toolkit.evaluate.conversation import Answer
    from toolkit.hosts.installation import DescribedInstallation
    from toolkit.pipeline.catalogue_row import CatalogueRow
    from toolkit.pipeline.check import CheckResult
    from toolkit.pipeline.doctor import Diagnosis
    from toolkit.pipeline.export import Order
    from toolkit.pipeline.inspect import BundleFacts, CheckpointFacts
    from toolkit.pipeline.judge import Effort
    from toolkit.pipeline.plan import ExportPlan
    from toolkit.recipe import Recipe
    from toolkit.report.compare import ComparedReports
    from toolkit.report.sections import PartitionRow, Report, Speed

Progress = Callable[[str], None]


def _silent(_: str) -> None:
    """Says nothing of how far the work is."""


def open_checkpoint(
    place: str | Path,
    *,
    revision: str | None = None,
    synthetic: bool = False,
    headers_alone: bool = False,
    adapter: str | Path | None = None,
) -> Checkpoint:
    """Opens the checkpoint in a folder, of an embedded model, or of a hub id, which is downloaded first.

    Every header is checked against the config. `revision` is a branch, tag or commit of a hub id. `synthetic` makes
    seeded random weights of the shapes in its config instead. With `headers_alone` the weights of a hub id stay there:
    enough for a plan, and reading one is an error. `adapter` is the folder of a LoRA adapter to merge into the weights.
    Raises CheckpointError for what is incomplete, damaged or no checkpoint.
    """
    from toolkit.pipeline.opening import open_place

    return open_place(str(place), synthetic, headers_alone, revision, adapter)


def plan(
    *names: str,
    checkpoint: str | Path | None = None,
    out: str | Path | None = None,
    changes: Sequence[str] = (),
    quality: str | None = None,
    calibration: str | Path | None = None,
    precision: str = "int4",
    synthetic: bool = False,
    shapes_alone: bool = False,
    revision: str | None = None,
    adapter: str | Path | None = None,
    draft: str | Path | None = None,
    trace: bool = False,
    note: Progress = _silent,
) -> list[ExportPlan]:
    """Decides everything about exports of one checkpoint and writes nothing: a plan for each recipe, in order.

    A recipe is a path, a name such as `14b-cpu`, a hub id that a recipe has for its model, or a bare target such as
    `cpu` with `checkpoint`, which is a folder or a hub id and otherwise the recipe's own model. `out` is where the
    bundle goes, or several of them, `build/` if it is not given; `changes` are `key=value` as for `--set`; `quality` is
    `fast`, `balanced` or `best`, `calibration` the path of a text, `precision` `int4` or `fp32`. `synthetic` stands
    random weights in for the checkpoint's, which get the quality `fast` unless another is named: they have no salient
    channels. With `shapes_alone` no weights are downloaded: the shapes are the model's published ones, or those in the
    headers of `checkpoint`, and the plan is not one to export. `revision` is a branch, tag or commit of a hub id.
    `adapter` is the folder of a LoRA adapter to merge into the checkpoint, `draft` a smaller model that guesses its
    tokens ahead, named as a checkpoint is. With `trace` a decoder of any family is traced by torch. `note` is told, a
    line each, which recipe a hub id means and what there is to know of the checkpoint's files.

    Raises RecipeError or CheckpointError for what does not exist or does not belong together, UnsupportedError for what
    the target cannot do.
    """
    from toolkit.pipeline.draft import plan_draft
    from toolkit.pipeline.export import plan_exports
    from toolkit.pipeline.opening import open_for_recipe
    from toolkit.pipeline.plan import shorten_context
    from toolkit.speculation import DRAFT
    from toolkit.target import TARGETS

    asked = {
        "quality": quality or ("fast" if synthetic or trace else None),
        "calibration": str(Path(calibration).resolve()) if calibration else None,
        "speculation": DRAFT if draft else None,
        "draft": None if draft is None else str(draft),
    }
    changes = [*changes, *(f"{key}={json.dumps(value)}" for key, value in asked.items() if value)]
    place = None if checkpoint is None else str(checkpoint)
    loaded = _loaded(names, changes, place, note)
    opened = open_for_recipe(loaded[0], place, synthetic, shapes_alone, revision, adapter, trace)
    for line in opened.notes:
        note(line)
    if not any(change.startswith("context_length=") for change in changes):
        loaded = [
            shorten_context(recipe, opened.config) if name in TARGETS else recipe
            for name, recipe in zip(names, loaded, strict=True)
        ]
    return [
        plan_draft(each, lambda recipe: open_for_recipe(recipe, None, synthetic, shapes_alone))
        for each in plan_exports(_orders(loaded, out), opened, precision)
    ]


def export(
    plans: str | Sequence[ExportPlan],
    *,
    compile: bool = True,
    force: bool = False,
    device: str = "cpu",
    workers: str | None = None,
    progress: Progress = _silent,
    note: Progress = _silent,
) -> list[Path]:
    """Makes the bundle of each plan, or of one recipe by its name, in one pass over the checkpoint; returns folders.

    An interrupted export goes on where it was. A finished bundle of equal inputs is not made again, and a validated one
    of others is not replaced, unless `force` is true. A transformer that has an ahead-of-time compiler is compiled
    unless `compile` is false. `device` is what calibration computes on: `cpu` (numpy), `torch` (torch on the CPU),
    `cuda`, `mps`, `xpu`, or `auto` for the best there is. `workers` is the address of a Dask scheduler whose workers
    take pieces of each layer, or a number of processes here. `note` is told in one line what was left out and why;
    `progress` is called with the name of each finished step. Raises ToolkitError before anything is written if
    checkpoint or machine will not do.
    """
    from toolkit.files import disk_errors
    from toolkit.pipeline.compile import compile_exported
    from toolkit.pipeline.computing import computing
    from toolkit.pipeline.draft import attach_drafts
    from toolkit.pipeline.export import export_planned
    from toolkit.pipeline.place import held

    with computing(device, workers, note) as fitting:
        plans = plan(plans) if isinstance(plans, str) else plans
        for draft in (each.draft for each in plans):
            if draft:
                export_planned([draft], progress, force, note, fitting)
        bundles = export_planned(plans, progress, force, note, fitting)
    attach_drafts(plans, bundles)
    for bundle in bundles:
        with disk_errors(bundle), held([bundle]):
            said = compile_exported(bundle, compile, progress)
        if said:
            note(said)
    return bundles


def validate(
    bundle: str | Path,
    checkpoint: str | Path | Checkpoint | None = None,
    effort: Effort | None = None,
    *,
    device: str = "cpu",
    workers: str | None = None,
    progress: Progress = _silent,
    note: Progress = _silent,
) -> Report:
    """Compares a bundle with the checkpoint it was made from, rewrites its report and returns it; `verdict` is in it.

    The checkpoint is the one the manifest names unless another place of the same files is given; `effort` says how much
    is measured. The checkpoint runs on `device`, or its sequences and questions side by side on `workers`, as in
    `export`; `note` is told in a line where its memory is full.
    Raises BundleError or CheckpointError if either cannot be read or they do not belong together.
    """
    from toolkit.checkpoint.opened import Checkpoint
    from toolkit.files import check_writable, disk_errors
    from toolkit.pipeline.computing import computing
    from toolkit.pipeline.judge import Effort, judge_bundle
    from toolkit.pipeline.opening import made_from
    from toolkit.pipeline.place import held

    bundle = Path(bundle)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = made_from(bundle, checkpoint)
    check_writable(bundle)
    with disk_errors(bundle), held([bundle]), computing(device, workers, note) as fitting:
        return judge_bundle(bundle, checkpoint, effort or Effort(), progress, fitting)


def check(bundle: str | Path, *, run: bool = False) -> CheckResult:
    """Holds a bundle's settings against its graphs, and each node against what its execution provider takes.

    `passed` and `problems` say what was found; `run` also runs the stages in their vendor's software, if it is here.
    """
    from toolkit.pipeline.check import check_bundle

    return check_bundle(Path(bundle), run)


def compile(bundle: str | Path, soc: str | None = None, *, progress: Progress = _silent) -> tuple[PartitionRow, ...]:
    """Compiles the transformer of a bundle ahead of time for its SoC, or for another; returns the report's `partition`.

    Raises UnsupportedError for a target without such a compiler, MachineError if the compiler is not installed.
    """
    from toolkit.files import disk_errors
    from toolkit.pipeline.compile import compile_bundle
    from toolkit.pipeline.place import followed, held

    # Binaries are made beside the folder itself, not beside a link to it.
    bundle = followed(Path(bundle))
    with disk_errors(bundle), held([bundle]):
        return compile_bundle(bundle, progress, soc)


def generate(bundle: str | Path, prompt: str, max_new_tokens: int = 400, *, on_cpu: bool = False) -> Answer:
    """One question's answer, the thought apart from it, through onnxruntime-genai and the bundle's chat template.

    `on_cpu` runs every stage on the CPU whatever the bundle is made for. For several turns, or text as it arrives, use
    `Conversation`. Raises BundleError or MachineError if the bundle cannot be run here.
    """
    from toolkit.evaluate.conversation import Conversation

    conversation = Conversation(Path(bundle), max_new_tokens, on_cpu)
    for _ in conversation.ask(prompt):
        pass
    return conversation.answer


def verify(bundle: str | Path, *, note: Progress = _silent) -> list[str]:
    """Holds every file of a bundle against its size and SHA-256 in the manifest, manifest and reports against their own
    digests; one line for each that differs, and for each file that is nobody's.

    `note` is told in a line of files that hosts of models put beside. Raises BundleError if there is no readable
    manifest.
    """
    from toolkit.report.intact import verify_bundle

    found = verify_bundle(Path(bundle))
    for line in found.notes:
        note(line)
    return list(found.problems)


def bench(
    bundle: str | Path, *, prompt_tokens: int = 128, new_tokens: int = 64, repeat: int = 5, on_cpu: bool = False
) -> Speed:
    """Measures a bundle's speed through onnxruntime-genai: the report's `speed`, medians over `repeat` runs.

    Raises BundleError or MachineError if the bundle cannot be run here.
    """
    from toolkit.evaluate.speed import measure_speed

    return measure_speed(Path(bundle), prompt_tokens, new_tokens, repeat, on_cpu)


def inspect(path: str | Path, *, revision: str | None = None) -> CheckpointFacts | BundleFacts:
    """What a checkpoint, here or on the hub, or a bundle is, read from headers alone: no weights are downloaded.

    `revision` is a branch, tag or commit of a hub id. Raises CheckpointError for what is neither.
    """
    from toolkit.checkpoint.download import hub_file, is_hub_id
    from toolkit.checkpoint.remote import open_headers
    from toolkit.pipeline.inspect import inspect_checkpoint, inspect_path

    place = path.as_posix() if isinstance(path, Path) else path
    if is_hub_id(place) or hub_file(place):
        return inspect_checkpoint(open_headers(place, revision))
    return inspect_path(Path(path))


def install(
    *bundles: str | Path,
    to: str,
    name: str | None = None,
    root: str | Path | None = None,
    base_url: str | None = None,
    license: str | None = None,
    dry_run: bool = False,
) -> list[DescribedInstallation]:
    """Puts bundles where another program reads them, and returns what was put where and what is left to do.

    `to` is `foundry-local`, `ai-toolkit`, `lemonade`, `windows-ml-catalog` or `package`, which takes bundles of one
    model for several execution providers. `name` is the model's name there and `root` the program's folder of models,
    if not the usual one; `base_url` and `license` are a catalogue's. Large files are hard links where the disk has
    them. With `dry_run` nothing is written. Raises RecipeError for a place that is somebody else's, BundleError for a
    bundle that would not run, UnsupportedError for what the program does not run.
    """
    from toolkit.pipeline.install import install_bundles

    place = None if root is None else Path(root)
    made = install_bundles([Path(bundle) for bundle in bundles], to, name, place, base_url, license, dry_run)
    return [installation.described() for installation in made]


def uninstall(folder: str | Path) -> list[str]:
    """Removes what `install` put into a folder, and nothing else; returns the names of files that are left there.

    Raises BundleError for a folder that `install` did not make.
    """
    from toolkit.hosts.installation import remove_installed

    return remove_installed(Path(folder))


def recipes(
    *words: str,
    model: str | None = None,
    target: str | None = None,
    license: str | None = None,
    max_bytes: int | None = None,
    min_context: int | None = None,
    runs_here: bool = False,
    bundles: Sequence[str | Path] = (),
    hub_ids: Sequence[str] = (),
) -> list[CatalogueRow]:
    """Searches the recipes that come with the toolkit, the bundles in folders, and checkpoints on the hub: a row each
    with sizes, licence, what this machine can do with it, and what was measured.

    `words` all stand in a row's names or licence; `model`, a name or hub id, `target` and `license` are globs.
    `max_bytes` and `min_context` bound bundles, `runs_here` leaves out what this machine does not run as it is.
    `bundles` are looked for at and below folders, `hub_ids` from the headers of their weights, for `target` or the CPU.
    Raises RecipeError if no row is left.
    """
    from toolkit.pipeline.catalogue import Search, search_catalogue

    places = tuple(map(Path, bundles)), tuple(hub_ids)
    return search_catalogue(Search(words, model, target, license, max_bytes, min_context, runs_here, *places))


def get(
    model: str,
    *,
    target: str | None = None,
    out: str | Path | None = None,
    quality: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    progress: Progress = _silent,
    note: Progress = _silent,
) -> Path:
    """Downloads a model and converts it for the best target of this machine; returns the bundle's folder.

    `model` is a model of the recipes such as `1.5b`, a hub id, or a folder. The best target is the first of the NPU's,
    the GPU's and the CPU's whose execution provider is here and whose bundle fits the memory; `target` names another.
    `note` is told which was chosen and why. Raises RecipeError for a model that is not known, MachineError where
    nothing fits.
    """
    from toolkit.pipeline.get import choose_target

    chosen = choose_target(model, target, revision)
    note(f"{chosen.target}: {chosen.why}")
    plans = plan(chosen.recipe, checkpoint=chosen.checkpoint, out=out, quality=quality, revision=revision, note=note)
    (bundle,) = export(plans, device=device, progress=progress, note=note)
    return bundle


def doctor(*folders: str | Path, fix: bool = False, progress: Progress = _silent) -> Diagnosis:
    """Looks at this machine and at the bundles in folders, `build` if none is named.

    It says what is installed, what each bundle would run on, what is wrong with it since the software changed, and the
    command that mends it. With `fix` binaries that no longer fit are compiled anew from the graphs beside them.
    """
    from toolkit.pipeline.doctor import diagnose

    return diagnose([Path(folder) for folder in folders] or [Path("build")], fix, progress)


def compare(a: str | Path, b: str | Path, *, tolerances: Mapping[str, str] | None = None) -> ComparedReports:
    """The reports of two bundles, or two report.json, side by side: `a` the earlier, `b` the later.

    `tolerances` say by the name of a figure how much worse it may be: `0.005`, `5%` of the earlier, or `any`. Raises
    BundleError where there is no report to read, RecipeError for a figure or an amount that is none.
    """
    from toolkit.report.compare import compare_reports
    from toolkit.report.summary import load_report_at

    return compare_reports(load_report_at(Path(a)), load_report_at(Path(b)), tolerances)


def _loaded(names: Sequence[str], changes: Sequence[str], place: str | None, note: Progress) -> list[Recipe]:
    """The recipes that are meant, all of one checkpoint; `note` is told which one a hub id means."""
    from toolkit.recipe import check_one_checkpoint, load_recipe, meant_recipe
    from toolkit.target import TARGETS

    for name in names:
        if (meant := meant_recipe(name, place)) != name:
            note(f"{place if name in TARGETS else name} has a recipe of its own: {meant}")
    loaded = [load_recipe(name, changes, place) for name in names]
    check_one_checkpoint(loaded, place)
    return loaded


def _orders(recipes: Sequence[Recipe], out: str | Path | None) -> list[Order]:
    """Each recipe with where its bundle goes: `out` itself for one, a folder of its own there for several."""
    from toolkit.pipeline.export import Order

    if out is not None and len(recipes) == 1:
        return [Order(recipes[0], Path(out))]
    return [Order(recipe, Path("build" if out is None else out) / recipe.name) for recipe in recipes]
