"""What an export will do and need, known from headers and rules alone."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.checkpoint.config import ModelConfig, read_config
from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.padded_heads import pad_heads
from toolkit.errors import MachineError, RecipeError
from toolkit.graph.decoder import HEAD_DIM_MULTIPLE
from toolkit.graph.layout import Layout, plan_layout
from toolkit.machine import free_memory_bytes
from toolkit.partition.pack import CHUNK_BYTES
from toolkit.recipe import Recipe
from toolkit.target import TARGETS

# Interpreter, numpy, onnx_ir and the compiler of the quantizers: measured, see LOG.md.
_BASE_BYTES: Final = 220 << 20
# At each core: a widened tile, what becomes of a chunk, and the pieces it is joined from.
_CORE_BYTES: Final = 12 << 20
_DISK_MARGIN_BYTES: Final = 64 << 20
# What decides whether a recipe fits a checkpoint; a fine-tune may resize the vocabulary or its positions.
_SHAPE_FIELDS: Final = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim",
)  # fmt: skip


@dataclass(frozen=True)
class ExportPlan:
    """One export, sized. `checkpoint` is as the graph needs it, heads padded; `peak_memory_bytes` is a forecast, the
    report has the measured figure."""

    recipe: Recipe
    checkpoint: Checkpoint
    layout: Layout
    files: dict[str, int]
    bits_per_weight: float
    peak_memory_bytes: int
    kv_cache_bytes: int
    disk_needed_bytes: int
    disk_free_bytes: int


def plan_export(recipe: Recipe, checkpoint: Checkpoint, out: Path, precision: str) -> ExportPlan:
    """The plan; raises RecipeError if recipe and checkpoint do not belong together."""
    check_match(recipe, checkpoint.config)
    checkpoint = pad_heads(checkpoint, HEAD_DIM_MULTIPLE)
    config = checkpoint.config
    layout = plan_layout(config, recipe if precision == "int4" else None)
    rotary_bytes = 4 * recipe.context_length * config.head_dim
    graph_bytes = rotary_bytes + 6_000 * config.num_hidden_layers
    cores = os.cpu_count() or 1
    existing = next(p for p in out.resolve().parents if p.exists())
    return ExportPlan(
        recipe=recipe,
        checkpoint=checkpoint,
        layout=layout,
        files={names.MODEL_FILE: graph_bytes, names.MODEL_DATA_FILE: layout.nbytes},
        bits_per_weight=layout.bits_per_weight(),
        peak_memory_bytes=_BASE_BYTES + 3 * rotary_bytes + cores * _CORE_BYTES + (2 * cores + 2) * CHUNK_BYTES,
        kv_cache_bytes=8 * recipe.context_length * config.num_hidden_layers * config.kv_size,
        disk_needed_bytes=layout.nbytes + graph_bytes + _DISK_MARGIN_BYTES,
        disk_free_bytes=shutil.disk_usage(existing).free,
    )


def check_match(recipe: Recipe, config: ModelConfig) -> None:
    """Raises RecipeError if the checkpoint is not of the shape the recipe was written for, or its context too long."""
    facts = recipe.facts()
    expected = read_config(facts) if facts else config
    for field in _SHAPE_FIELDS:
        found, wanted = getattr(config, field), getattr(expected, field)
        if found != wanted:
            raise RecipeError(
                f"recipe {recipe.name} is for {recipe.model} with {field} {wanted}, the checkpoint has {found}: use "
                f"its own recipe, or the target's defaults with `toolkit export {recipe.target} --checkpoint …`"
            )
    if recipe.context_length > config.max_position_embeddings:
        raise RecipeError(
            f"context_length {recipe.context_length} is more than the checkpoint's max_position_embeddings "
            f"{config.max_position_embeddings}: lower it with --set context_length={config.max_position_embeddings}"
        )


def shorten_context(recipe: Recipe, config: ModelConfig) -> Recipe:
    """A target's default context, cut to what the checkpoint allows."""
    return replace(recipe, context_length=min(recipe.context_length, config.max_position_embeddings))


def check_machine(plan: ExportPlan, already_written_bytes: int) -> None:
    """Raises MachineError if disk or memory will not do."""
    if plan.disk_free_bytes + already_written_bytes < plan.disk_needed_bytes:
        raise MachineError(
            f"the disk has {plan.disk_free_bytes >> 20} MiB free, the bundle needs {plan.disk_needed_bytes >> 20} MiB: "
            "free space or name another place with --out"
        )
    if (free := free_memory_bytes()) < plan.peak_memory_bytes:
        raise MachineError(
            f"{free >> 20} MiB of memory are free, the export needs about {plan.peak_memory_bytes >> 20} MiB: "
            "close other programs"
        )


def describe(plan: ExportPlan, config: ModelConfig) -> dict[str, object]:
    """The plan as `--dry-run` shows it."""
    target = TARGETS[plan.recipe.target]
    stage = {"stage": "model", "file": names.MODEL_FILE, "ep": target.execution_provider, "device": target.device}
    return {
        "recipe": plan.recipe.name,
        "model": plan.recipe.model,
        "target": plan.recipe.target,
        "context_length": plan.recipe.context_length,
        "layers": config.num_hidden_layers,
        "weights": plan.layout.weights(),
        "stages": [stage],
        "files": [{"name": name, "bytes": nbytes} for name, nbytes in plan.files.items()],
        "bits_per_weight": plan.bits_per_weight,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "kv_cache_bytes": plan.kv_cache_bytes,
        "disk_needed_bytes": plan.disk_needed_bytes,
        "disk_free_bytes": plan.disk_free_bytes,
    }
