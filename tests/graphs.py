"""Graphs of a checkpoint with their data and settings, without the rest of a bundle; and one bundle whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from toolkit.bundle.genai_config import genai_config, pad_token_id
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.checkpoint.padded_heads import pad_heads
from toolkit.graph.attention import HEAD_DIM_MULTIPLE
from toolkit.graph.layout import Layout, plan_layout
from toolkit.partition.data_files import Destination
from toolkit.partition.lower import lower
from toolkit.partition.pack import pack_weights
from toolkit.pipeline.export import Order, export_bundles
from toolkit.recipe import QuantRule, Recipe
from toolkit.target import TARGETS

CONTEXT_LENGTH, WINDOW = 64, 8
# tiny-r1's recipes without their calibration, for tests of everything else.
EIGHT_BITS = ("quality=fast", "bits_per_weight=0", "quantize.0.bits=8", "quantize.0.block_size=32")
SET_EIGHT_BITS = tuple(word for change in EIGHT_BITS for word in ("--set", change))


def recipe_for(target: str, rules: tuple[QuantRule, ...] = (QuantRule("*"),)) -> Recipe:
    """A recipe of the tests' context and window."""
    window = WINDOW if TARGETS[target].partitioned else 0
    return Recipe("r", "m", target, CONTEXT_LENGTH, rules, {}, window=window, quality="fast")


def write_graphs(
    checkpoint: Path,
    folder: Path,
    target: str = "cpu",
    recipe: Recipe | None = None,
    context_length: int = CONTEXT_LENGTH,
) -> Layout:
    """What the target's bundle computes with, float32 unless a recipe quantizes it; returns the layout."""
    folder.mkdir(exist_ok=True)
    row = TARGETS[target].in_precision("int4" if recipe else "fp32")
    padded = pad_heads(open_checkpoint(checkpoint), HEAD_DIM_MULTIPLE)
    layout = plan_layout(padded.config, row, recipe)
    pack_weights(padded.source, [Destination(layout, folder)])
    pad = pad_token_id(padded.config, padded.side)
    stop_ids = padded.side.generation.eos_token_ids or padded.config.eos_token_ids
    graphs = lower(
        padded.config, layout, row, recipe or replace(recipe_for(target), context_length=context_length), pad
    )
    for graph in graphs:
        graph.save(folder)
    settings = genai_config(padded.config, padded.side, stop_ids, context_length, graphs)
    (folder / "genai_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return layout


def export_bundle(recipe: Recipe, checkpoint: Checkpoint, out: Path, precision: str = "int4") -> Path:
    """One recipe to one bundle."""
    (bundle,) = export_bundles([Order(recipe, out)], checkpoint, precision)
    return bundle
