"""The draft of a bundle that speculates: a smaller model's own bundle beside it, and its files in the bundle.

The draft is an ordinary bundle, `<bundle>-draft`, made by the same code and kept for the next export; the model's
bundle has its weights by hard links, and a copy of its graph that knows them by other names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from toolkit import names
from toolkit.bundle.manifest import read_manifest, save_manifest
from toolkit.bundle.speculative import SPECULATION_FILE, draft_decoder, speculation_settings
from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.vocabulary import check_same_words, widen_vocabulary
from toolkit.errors import BundleError
from toolkit.files import disk_errors, file_entry, link_or_copy, replacing, write_json
from toolkit.graph.interface import read_interface, save_with_data_at
from toolkit.pipeline.place import followed, held
from toolkit.pipeline.plan import ExportPlan, plan_export
from toolkit.recipe import Recipe, load_recipe
from toolkit.report.summary import amend_report
from toolkit.speculation import DRAFT


def plan_draft(plan: ExportPlan, open_draft: Callable[[Recipe], Checkpoint]) -> ExportPlan:
    """The plan with that of its draft, if its recipe names one; `open_draft` opens the checkpoint of a recipe.

    Raises RecipeError for a draft of another tokenizer, or of more ids than the model has, and what a plan raises.
    """
    if plan.recipe.speculation != DRAFT:
        return plan
    named = draft_recipe(plan.recipe)
    opened = open_draft(named)
    check_same_words(plan.opened, opened)
    # A name of its own, or its shapes would be held against those of the model it drafts for.
    recipe = replace(named, name=f"{plan.recipe.name}-{DRAFT}", tasks=(), baseline=False)
    fitted = widen_vocabulary(opened, plan.checkpoint.config.vocab_size)
    out = plan.out.with_name(f"{plan.out.name}-{DRAFT}")
    return replace(plan, draft=plan_export(recipe, fitted, out, plan.precision))


def draft_recipe(recipe: Recipe) -> Recipe:
    """The recipe of a recipe's draft: its own where there is one, in the same form, quality and context."""
    told = {"quality": recipe.quality, "context_length": recipe.context_length, "profile": recipe.profile}
    changes = [f"{key}={value}" for key, value in told.items() if value]
    return load_recipe(recipe.target, changes, recipe.draft)


def with_drafts(plans: Sequence[ExportPlan]) -> list[ExportPlan]:
    """Every bundle that these plans make, drafts before the models they are for."""
    return [each for plan in plans for each in (plan.draft, plan) if each is not None]


def attach_drafts(plans: Sequence[ExportPlan], bundles: Sequence[Path]) -> None:
    """Puts the finished draft of each plan that has one into its bundle, which nobody else writes meanwhile."""
    for plan, bundle in zip(plans, bundles, strict=True):
        if plan.draft:
            with disk_errors(bundle), held([bundle]):
                attach_draft(bundle, followed(plan.draft.out))


def attach_draft(bundle: Path, draft: Path) -> None:
    """Puts a draft's graph and weights into a bundle, and what onnxruntime-genai is told of them; what is there already
    stays. Raises BundleError for a draft whose logits are as wide as another vocabulary."""
    manifest, theirs = read_manifest(bundle), read_manifest(draft)
    graph = names.stage_file(names.MODEL)
    width, own = (read_interface(place / graph).outputs[names.LOGITS].shape[-1] for place in (bundle, draft))
    if own != width:
        raise BundleError(f"{draft} was made for {own} ids, the model has {width}: make it anew with --force")
    data = [entry for entry in theirs.files if entry.name.endswith(".data")]
    entries = [replace(entry, name=names.draft_file(entry.name)) for entry in data]
    with replacing(bundle / names.draft_file(graph)) as fresh:
        save_with_data_at(draft / graph, fresh, names.draft_file)
        entries.append(replace(file_entry(fresh), name=names.draft_file(graph)))
    for entry, source in zip(entries, data, strict=False):
        place = bundle / entry.name
        if entry not in manifest.files or not place.is_file():
            place.unlink(missing_ok=True)
            link_or_copy(draft / source.name, place)
    write_json(bundle / SPECULATION_FILE, speculation_settings(DRAFT, draft_decoder(draft)))
    entries.append(file_entry(bundle / SPECULATION_FILE))
    if set(entries) <= set(manifest.files):
        return
    kept = tuple(entry for entry in manifest.files if not names.is_draft(entry.name))
    save_manifest(bundle / names.MANIFEST_FILE, replace(manifest, files=kept).with_files(entries))
    amend_report(bundle, lambda report: report)
