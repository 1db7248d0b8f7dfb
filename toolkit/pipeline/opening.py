"""Which checkpoint an export reads: the one that is named, the recipe's own, or random weights of a model's shapes."""

from __future__ import annotations

from pathlib import Path

from toolkit.bundle.manifest import read_manifest
from toolkit.checkpoint.adapter import merge_adapter
from toolkit.checkpoint.any_decoder import open_any_decoder
from toolkit.checkpoint.download import resolve_checkpoint
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint, synthetic_checkpoint
from toolkit.checkpoint.remote import open_headers
from toolkit.errors import RecipeError
from toolkit.recipe import Recipe


def open_place(
    place: str, synthetic: bool, headers_alone: bool, revision: str | None, adapter: str | Path | None
) -> Checkpoint:
    """The checkpoint in a folder, of an embedded model, or of a hub id, whose weights stay there if its headers alone
    are wanted."""
    if headers_alone and not synthetic:
        opened = open_headers(place, revision)
    else:
        folder = resolve_checkpoint(place, revision, weights=not synthetic)
        opened = synthetic_checkpoint(folder) if synthetic else open_checkpoint(folder)
    return merge_adapter(opened, Path(adapter)) if adapter else opened


def open_for_recipe(
    recipe: Recipe,
    place: str | None,
    synthetic: bool,
    shapes_alone: bool,
    revision: str | None = None,
    adapter: str | Path | None = None,
    trace: bool = False,
) -> Checkpoint:
    """The checkpoint at `place`, or else the recipe's own: its published shapes where no numbers are needed, unless the
    model itself is on this machine. One to `trace` is opened as far as that needs."""
    if trace:
        # Imports what makes graphs.
        from toolkit.pipeline.traced import open_to_trace

        return open_to_trace(recipe, place or recipe.model, synthetic, revision, adapter)
    facts, model = recipe.facts(), recipe.model
    if facts is None or revision or Path(model).exists() or not (synthetic or shapes_alone):
        place = place or model
    return open_place_or_shapes(place, facts, synthetic, shapes_alone, revision, adapter)


def open_place_or_shapes(
    place: str | None,
    facts: Path | None,
    synthetic: bool,
    headers_alone: bool,
    revision: str | None,
    adapter: str | Path | None,
) -> Checkpoint:
    """The checkpoint at `place`, or else random weights of the shapes of the model's facts."""
    if adapter and synthetic:
        raise RecipeError("--adapter is merged into a checkpoint's weights, and --synthetic has none: leave one out")
    if place:
        return open_place(place, synthetic, headers_alone, revision, adapter)
    if facts is None:
        raise RecipeError("--synthetic needs the shapes: name a folder with a config.json with --checkpoint")
    return synthetic_checkpoint(facts)


def made_from(
    bundle: str | Path, place: str | Path | None = None, revision: str | None = None, adapter: str | Path | None = None
) -> Checkpoint:
    """Opens the checkpoint that a bundle's manifest names, or the same one at another place or hub revision.

    `adapter` is the folder of the LoRA adapter that was merged into it, if one was.
    """
    manifest = read_manifest(Path(bundle))
    recipe, synthetic = manifest.recipe, manifest.synthetic
    # Random weights need the shapes alone: the model's facts have them, or the model itself where it is a folder.
    named = recipe.model if Path(recipe.model).exists() or not synthetic else None
    if place:
        named = str(place)
    if manifest.traced:
        return open_any_decoder(resolve_checkpoint(str(place or recipe.model), revision))
    return open_place_or_shapes(named, recipe.facts(), synthetic, False, revision, adapter)
