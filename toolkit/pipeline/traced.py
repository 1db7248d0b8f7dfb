"""The plan of a bundle whose graph is traced rather than written: any decoder of transformers, on the CPU.

Text is read by the toolkit's own forward pass, which knows no traced model: its weights are rounded without one.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.bundle.operators import placement_of
from toolkit.checkpoint.any_decoder import open_any_decoder, with_tensors
from toolkit.checkpoint.download import resolve_checkpoint
from toolkit.checkpoint.opened import Checkpoint
from toolkit.errors import RecipeError, UnsupportedError
from toolkit.graph.builder import StageGraph
from toolkit.graph.interface import interface_of, load_graph
from toolkit.graph.traced import build_traced, plan_traced_layout, read_traced
from toolkit.machine import free_disk_bytes
from toolkit.partition.pack import CHUNK_BYTES
from toolkit.pipeline.place import followed
from toolkit.pipeline.plan import (
    BASE_BYTES,
    CORE_BYTES,
    DISK_MARGIN_BYTES,
    ExportPlan,
    check_match,
    planned_stop_tokens,
    planned_tokenizer,
)
from toolkit.quality import QUALITIES
from toolkit.recipe import Recipe, nearest, sized
from toolkit.speculation import NONE
from toolkit.target import TARGETS, Target
from toolkit.thresholds import resolved
from toolkit.trace.traced import check_packages, trace_decoder

TARGET: Final = "cpu"
QUALITY: Final = "fast"


def check_traceable(recipe: Recipe) -> None:
    """Raises UnsupportedError for a recipe that a traced model cannot have, MachineError where a package is missing."""
    if recipe.target != TARGET or recipe.profile:
        which = f"target {recipe.target}" if recipe.target != TARGET else f"profile={recipe.profile}"
        raise UnsupportedError(
            f"--trace is for target {TARGET} in its own form, not for {which}: a traced graph has attention in plain "
            "operators and a cache that grows"
        )
    reads = [name for name, quality in QUALITIES.items() if not quality.tokens]
    if recipe.calibrated or recipe.bits_per_weight or recipe.rotate:
        raise UnsupportedError(
            f"recipe {recipe.name} reads text through the checkpoint or changes its weights, and of a traced model the "
            f"layers are not known: expected --quality {' or '.join(reads)}, rules of rtn or kquant, no rotate and no "
            "bits_per_weight"
        )
    if recipe.speculation != NONE:
        raise UnsupportedError("--trace is without speculation, whose graphs are written otherwise: leave one out")
    check_packages()


def open_to_trace(
    recipe: Recipe, place: str, synthetic: bool, revision: str | None, adapter: str | Path | None
) -> Checkpoint:
    """The checkpoint at `place` as far as it is read before it is traced. Raises RecipeError for options that a traced
    one cannot have, UnsupportedError for recipes and families that cannot be traced."""
    for option, given in (("--synthetic", synthetic), ("--adapter", adapter)):
        if given:
            raise RecipeError(f"--trace reads the weights of a checkpoint as they are, without {option}: leave one out")
    check_traceable(recipe)
    return open_any_decoder(resolve_checkpoint(place, revision))


def plan_traced(recipe: Recipe, checkpoint: Checkpoint, out: Path, precision: str) -> ExportPlan:
    """The plan of a traced bundle, its graph in it; nothing is written, and no weight is read.

    Raises RecipeError for rules that decide nothing, CheckpointError for tensors that are missing, MachineError where a
    package is, UnsupportedError for what torch cannot trace or ONNX Runtime's table of operators does not have.
    """
    check_traceable(recipe)
    check_match(recipe, checkpoint.config)
    target = TARGETS[recipe.target].in_profile(recipe.profile).in_precision(precision)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / names.stage_file(names.MODEL)
        facts = trace_decoder(checkpoint.folder, path, checkpoint.config.model_type)
        graph_bytes, model = path.stat().st_size, load_graph(path)
    opened, (checkpoint, tensors) = checkpoint, with_tensors(checkpoint, facts.shapes, facts.aliases)
    traced = read_traced(model, facts.shapes, tensors)
    modules = [tensors[name].removesuffix(".weight") for name in traced.uses]
    parameters = sum(map(prod, facts.shapes.values()))
    recipe = replace(recipe, quantize=sized(recipe.quantize, parameters))
    if precision == "int4":
        _check_rules(recipe, target, modules)
    layout = plan_traced_layout(traced, target, recipe if precision == "int4" else None)
    graph = StageGraph(target.stages(recipe.window)[0], build_traced(traced, layout, target.form))
    _check_operators(graph)
    limits = resolved(recipe.validate, target.measured_kld, parameters)
    recipe = replace(recipe, parts=1, rotate=False, validate={**limits})
    tokenizer, cores = planned_tokenizer(opened), os.cpu_count() or 1
    return ExportPlan(
        recipe=recipe,
        target=target,
        precision=precision,
        out=followed(out),
        opened=opened,
        checkpoint=checkpoint,
        layout=layout,
        files={graph.stage.file: graph_bytes, **layout.files},
        bits_per_weight=layout.bits_per_weight(),
        peak_memory_bytes=BASE_BYTES + 3 * graph_bytes + cores * CORE_BYTES + (2 * cores + 2) * CHUNK_BYTES,
        compile_memory_bytes=0,
        kv_cache_bytes=4 * recipe.context_length * _cached_numbers(graph),
        calibration_cost=None,
        salient_inputs=[],
        tokenizer=tokenizer,
        stop_tokens=tuple(planned_stop_tokens(opened, tokenizer)),
        disk_needed_bytes=layout.nbytes + graph_bytes + DISK_MARGIN_BYTES,
        disk_free_bytes=free_disk_bytes(out),
        traced=graph,
    )


def _check_rules(recipe: Recipe, target: Target, modules: list[str]) -> None:
    """Raises RecipeError for a rule of the user's own that no packed matrix has the name of; a `*` finds what is
    left."""
    for k, rule in enumerate(recipe.quantize):
        if not any(map(rule.matches, modules)) and rule.match not in target.own_matches:
            near = nearest(rule.match, modules)
            raise RecipeError(f"recipe {recipe.name}: rule {k + 1} matches no module: {rule.match!r}{near}")


def _check_operators(graph: StageGraph) -> None:
    """Raises UnsupportedError for a graph with a node that the provider's table does not have."""
    placed = placement_of(interface_of(graph.model), graph.stage)
    if placed.problems:
        more = f", and {len(placed.problems) - 1} more kinds of nodes" if placed.problems[1:] else ""
        raise UnsupportedError(
            f"the traced graph is not known to run: {placed.problems[0]}{more}: toolkit/bundle/operators.json has what "
            f"{graph.stage.execution_provider} computes"
        )


def _cached_numbers(graph: StageGraph) -> int:
    """How many numbers of the cache a token is."""
    past = [value for value in graph.model.graph.inputs if names.is_past(str(value.name))]
    shapes = [value.shape for value in past if value.shape is not None]
    return sum(prod(dim for dim in tuple(shape)[1::2] if isinstance(dim, int)) for shape in shapes)
