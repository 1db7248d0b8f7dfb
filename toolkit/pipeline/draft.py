"""What guesses for a bundle that speculates: a smaller model's, or the MTP head's, own bundle beside it, and its files
in the bundle.

It is an ordinary bundle, `<bundle>-draft` or `<bundle>-mtp`, made by the same code and kept for the next export; the
model's bundle has its weights by hard links, and a copy of its graph that knows them by other names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from toolkit import names
from toolkit.bundle.manifest import read_manifest, save_manifest
from toolkit.bundle.speculative import SPECULATION_FILE, draft_decoder, mtp_decoder, speculation_settings
from toolkit.checkpoint.opened import Checkpoint, mtp_checkpoint
from toolkit.checkpoint.vocabulary import check_same_words, widen_vocabulary
from toolkit.errors import BundleError
from toolkit.files import disk_errors, file_entry, link_or_copy, replacing, write_json
from toolkit.graph.interface import read_interface, save_with_data_at
from toolkit.pipeline.place import followed, held
from toolkit.pipeline.plan import ExportPlan, plan_export
from toolkit.recipe import Recipe, load_recipe, parse_recipe
from toolkit.report.summary import amend_report
from toolkit.speculation import DRAFT, MTP


def plan_draft(plan: ExportPlan, open_draft: Callable[[Recipe], Checkpoint]) -> ExportPlan:
    """The plan with that of its draft, if its recipe names one, or of its MTP head; `open_draft` opens the checkpoint
    of a recipe.

    Raises RecipeError for a draft of another tokenizer, or of more ids than the model has, CheckpointError for a head
    whose tensors are missing, and what a plan raises.
    """
    if plan.recipe.speculation == MTP:
        head = mtp_checkpoint(plan.opened)
        return replace(plan, draft=plan_export(_mtp_recipe(plan.recipe), head, _beside(plan.out, MTP), plan.precision))
    if plan.recipe.speculation != DRAFT:
        return plan
    named = draft_recipe(plan.recipe)
    opened = open_draft(named)
    check_same_words(plan.opened, opened)
    # A name of its own, or its shapes would be held against those of the model it drafts for.
    recipe = replace(named, name=f"{plan.recipe.name}-{DRAFT}", tasks=(), baseline=False)
    fitted = widen_vocabulary(opened, plan.checkpoint.config.vocab_size)
    return replace(plan, draft=plan_export(recipe, fitted, _beside(plan.out, DRAFT), plan.precision))


def _beside(bundle: Path, word: str) -> Path:
    return bundle.with_name(f"{bundle.name}-{word}")


def _mtp_recipe(recipe: Recipe) -> Recipe:
    """The recipe of a recipe's MTP head, in the same form and context. No text is read: what the head guesses wrong
    costs time, and no answer. Nor is anything turned, since the hidden states it takes are not."""
    told = {"context_length": recipe.context_length, "profile": recipe.profile, "quality": "fast", "rotate": False}
    raw = {"name": f"{recipe.name}-{MTP}", "model": recipe.model, "target": recipe.target, **told}
    return parse_recipe(raw, f"the MTP head of recipe {recipe.name}")


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
                attach_draft(bundle, followed(plan.draft.out), plan.recipe.speculation)


def attach_draft(bundle: Path, draft: Path, word: str = DRAFT) -> None:
    """Puts the graph and weights of a draft, or of an MTP head, into a bundle, and what onnxruntime-genai is told of
    them; what is there already stays. Raises BundleError for a draft whose logits are as wide as another vocabulary."""
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
    decoder = mtp_decoder(draft) if word == MTP else draft_decoder(draft)
    write_json(bundle / SPECULATION_FILE, speculation_settings(word, decoder))
    entries.append(file_entry(bundle / SPECULATION_FILE))
    if set(entries) <= set(manifest.files):
        return
    kept = tuple(entry for entry in manifest.files if not names.is_draft(entry.name))
    save_manifest(bundle / names.MANIFEST_FILE, replace(manifest, files=kept).with_files(entries))
    amend_report(bundle, lambda report: report)
