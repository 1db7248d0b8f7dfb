"""What an export will do and need, known from headers and rules alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.bundle.genai_config import check_switch, genai_type, unasked_length
from toolkit.bundle.operators import check_experts, check_linear_attention
from toolkit.bundle.stop_tokens import StopToken, stop_tokens
from toolkit.calibrate.tuning import check_tunable
from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig, read_config
from toolkit.checkpoint.mtp import mtp_config
from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.padded_heads import pad_heads
from toolkit.checkpoint.rotated import can_rotate, rotate, salient_inputs
from toolkit.checkpoint.weights import parameter_count
from toolkit.errors import MachineError, RecipeError, UnsupportedError
from toolkit.graph.attention import HEAD_DIM_MULTIPLE
from toolkit.graph.blocks import check_layers
from toolkit.graph.builder import StageGraph
from toolkit.graph.latent_cache import cached_numbers, check_latent_cache, state_numbers
from toolkit.graph.layout import Layout, plan_layout
from toolkit.machine import free_disk_bytes, free_memory_bytes, ram_bytes
from toolkit.partition.pack import CHUNK_BYTES
from toolkit.partition.parts import (
    BINARY_SHARE,
    check_parts,
    compile_memory_bytes,
    largest_part,
    layer_bytes,
    plan_parts,
)
from toolkit.pipeline.calibration_cost import CalibrationCost, calibration_cost
from toolkit.pipeline.place import followed
from toolkit.pipeline.tokenizer import TokenizerFiles, plan_tokenizer
from toolkit.quant.formats import check_rules
from toolkit.recipe import Recipe, sized
from toolkit.soc import SOCS
from toolkit.speculation import MTP, NONE
from toolkit.target import TARGETS, Target
from toolkit.thresholds import resolved

# Interpreter, numpy, onnx_ir and the compiler of the quantizers: measured, see LOG.md.
BASE_BYTES: Final = 220 << 20
# At each core: a widened tile, what becomes of a chunk, and the pieces it is joined from.
CORE_BYTES: Final = 12 << 20
DISK_MARGIN_BYTES: Final = 64 << 20
# What decides whether a recipe fits a checkpoint; a fine-tune may resize the vocabulary or its positions.
_SHAPE_FIELDS: Final = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclass(frozen=True)
class ExportPlan:
    """What one export will make and need.

    `opened` is the checkpoint as it was given, `checkpoint` as the graph needs it, rotated and with padded heads,
    and `salient_inputs` has what rounding without data spoils in it. `peak_memory_bytes` is a forecast, of which
    the report has the measured figure, and `compile_memory_bytes` one of compiling a part, 0 where that is no step.
    `kv_cache_bytes` is a cache of the whole context, `opened_cache_bytes` that of a request which does not say how
    long it will be. `tokenizer` is None where the checkpoint has none, which an export refuses. `draft` is the plan of
    the smaller model that guesses for this one, where one does. `traced` is the graph of a decoder that was traced, and
    None where graphs are written from the layout.
    """

    recipe: Recipe
    target: Target
    precision: str
    out: Path
    opened: Checkpoint
    checkpoint: Checkpoint
    layout: Layout
    files: dict[str, int]
    bits_per_weight: float
    peak_memory_bytes: int
    compile_memory_bytes: int
    kv_cache_bytes: int
    calibration_cost: CalibrationCost | None
    salient_inputs: list[str]
    tokenizer: TokenizerFiles | None
    stop_tokens: tuple[StopToken, ...]
    disk_needed_bytes: int
    disk_free_bytes: int
    draft: ExportPlan | None = None
    traced: StageGraph | None = None

    @property
    def opened_cache_bytes(self) -> int:
        """The bytes of a cache for a request which does not say how long it will be."""
        length = self.recipe.context_length
        return self.kv_cache_bytes * unasked_length(length, self.target.partitioned) // length


def plan_export(recipe: Recipe, checkpoint: Checkpoint, out: Path, precision: str) -> ExportPlan:
    """The plan; its recipe has the number of parts, the size of every block and every threshold.

    Raises RecipeError if recipe and checkpoint do not belong together, UnsupportedError for parts that cannot be.
    """
    out = followed(out)
    _check_recipe(recipe, checkpoint)
    target = _target(recipe, precision)
    blind = precision == "int4" and not recipe.calibrated
    # Gains that are not here cannot be looked at; the export will.
    salient = salient_inputs(checkpoint) if blind and not checkpoint.download_bytes else []
    wanted = bool(salient) or (precision == "int4" and target.rotates(recipe.profile))
    recipe = _with_rotation(_with_blocks(recipe, checkpoint.config), checkpoint.config, wanted)
    opened, checkpoint = checkpoint, pad_heads(rotate(checkpoint) if recipe.rotate else checkpoint, HEAD_DIM_MULTIPLE)
    config = checkpoint.config
    _check_target(target, config, recipe.context_length)
    layout = _layout(config, target, recipe if precision == "int4" else None)
    check_latent_cache(target.form, config, layout)
    layers = layer_bytes(layout, config.num_hidden_layers)
    recipe = _with_thresholds(_with_parts(recipe, target, layers), target, config)
    compiled = bool(target.soc) and precision == "int4"
    tokenizer = planned_tokenizer(opened)
    item_bytes = 2 if target.form.activations == "float16" else 4
    graphs = _graph_files(recipe, target, config, item_bytes)
    cores = os.cpu_count() or 1
    graph_bytes = sum(graphs.values())
    cost = calibration_cost(recipe, config, target.form) if precision == "int4" else None
    packing = 3 * graph_bytes + cores * CORE_BYTES + (2 * cores + 2) * CHUNK_BYTES
    if recipe.rotate:
        # Matrices whose rows mix are turned whole, two at once, each with copies on the way.
        packing += 2 * 3 * 4 * config.hidden_size * config.intermediate_size
    if target.form.qdq and precision == "int4":
        # Gathered whole before they are turned: what is waiting, and the pieces of it joined.
        packing += 2 * 2 * max(unit.slots[0].nbytes for unit in layout.matrices() if unit.spec and unit.spec.signed)
    return ExportPlan(
        recipe=recipe,
        target=target,
        precision=precision,
        out=out,
        opened=opened,
        checkpoint=checkpoint,
        layout=layout,
        files={**graphs, **layout.files},
        bits_per_weight=layout.bits_per_weight(),
        peak_memory_bytes=BASE_BYTES + max(packing, cost.memory_bytes if cost else 0),
        compile_memory_bytes=compile_memory_bytes(largest_part(layers, recipe.parts)) if compiled else 0,
        kv_cache_bytes=item_bytes
        * (recipe.context_length * cached_numbers(target.form, config) + state_numbers(config)),
        calibration_cost=cost,
        salient_inputs=salient,
        tokenizer=tokenizer,
        stop_tokens=tuple(planned_stop_tokens(opened, tokenizer)),
        # What a budget buys is known once the text has been read.
        disk_needed_bytes=max(layout.nbytes, int(recipe.bits_per_weight * layout.weights() / 8))
        + graph_bytes
        + DISK_MARGIN_BYTES
        + int(compiled * BINARY_SHARE * sum(layers))
        + (cost.disk_bytes if cost else 0),
        disk_free_bytes=free_disk_bytes(out),
    )


def planned_tokenizer(checkpoint: Checkpoint) -> TokenizerFiles | None:
    """What a bundle's tokenizer will be; None where the checkpoint has none, which who only plans may do without."""
    there = checkpoint.synthetic or (checkpoint.folder / names.TOKENIZER_FILE).is_file()
    return plan_tokenizer(checkpoint) if there else None


def planned_stop_tokens(checkpoint: Checkpoint, tokenizer: TokenizerFiles | None) -> list[StopToken]:
    """The ids that end an answer; random weights, which answer nothing, may do with any."""
    config = checkpoint.config
    if checkpoint.synthetic and not (config.eos_token_ids or checkpoint.side.generation.eos_token_ids):
        return [StopToken(0, "", ("random weights",))]
    after_answer = tokenizer.after_answer if tokenizer else ""
    return stop_tokens(checkpoint.side, config.eos_token_ids, config.vocab_size, after_answer)


def _layout(config: ModelConfig, target: Target, recipe: Recipe | None) -> Layout:
    """The layout of a recipe whose rules all decide something; None quantizes nothing."""
    if recipe is not None:
        check_rules(config, recipe)
        if recipe.tuning_steps:
            check_tunable(config, target.form)
    return plan_layout(config, target, recipe)


def _graph_files(recipe: Recipe, target: Target, config: ModelConfig, item_bytes: int) -> dict[str, int]:
    """About how large each graph file will be: tables of RoPE, and a few kilobytes of nodes a layer."""
    stages = target.stages(recipe.window, recipe.parts)
    length = recipe.context_length
    ropes = {config.rope_of(layer.attention.window) for layer in decoder_of(config).layers}
    rotary_bytes = item_bytes * config.head_dim * sum(length + (rope.switch(length) or 0) for rope in ropes)
    layers = rotary_bytes + 6_000 * -(-config.num_hidden_layers // recipe.parts)
    return {stage.file: 4_000 if stage.name in (names.EMBEDDINGS, names.HEAD) else layers for stage in stages}


def _target(recipe: Recipe, precision: str) -> Target:
    """The recipe's row, in its profile and for its SoC."""
    target = TARGETS[recipe.target].in_profile(recipe.profile).in_precision(precision)
    return target.on_soc(SOCS[recipe.soc]) if recipe.soc else target


def _check_target(target: Target, config: ModelConfig, context_length: int) -> None:
    """Raises UnsupportedError for what a target cannot do with a model of this config."""
    check_experts(target, config)
    check_linear_attention(target, config)
    check_switch(target, config, context_length)
    check_layers(target.form, config, context_length)


def _check_recipe(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Raises what `check_match` raises, and UnsupportedError where guesses are asked for of a model whose text cannot
    be taken back, as wrong guesses are, or is sampled in a way that is not checked several tokens at once."""
    check_match(recipe, checkpoint.config)
    if recipe.speculation == NONE:
        return
    leave = "leave speculation out"
    if recipe.speculation == MTP:
        mtp_config(checkpoint.config)
        if recipe.rotate:
            raise RecipeError("rotate turns the hidden states that an MTP head takes: leave rotate out, or speculation")
    if checkpoint.config.structure.delta_net:
        raise UnsupportedError(
            f"{checkpoint.config.model_type} has linear attention, whose state cannot be taken back to before a wrong "
            f"guess: {leave}"
        )
    if (switch := checkpoint.config.rope.switch(recipe.context_length)) is not None:
        raise UnsupportedError(
            f"{checkpoint.config.model_type} reads a text anew at {switch} tokens (LongRoPE), and guesses cannot be "
            f"taken back across that: {leave}, or set context_length={switch}"
        )
    if checkpoint.side.generation.sampling.no_repeat_ngram_size:
        raise UnsupportedError(
            f"generation_config.json sets no_repeat_ngram_size, with which onnxruntime-genai guesses nothing: {leave}"
        )
    penalty = checkpoint.side.generation.sampling.repetition_penalty
    if penalty not in (None, 1.0):
        raise UnsupportedError(
            f"generation_config.json sets repetition_penalty {penalty:g}, which onnxruntime-genai counts otherwise for "
            f"guesses, so that answers become others: {leave}"
        )


def _with_blocks(recipe: Recipe, config: ModelConfig) -> Recipe:
    return replace(recipe, quantize=sized(recipe.quantize, parameter_count(config)))


def _with_rotation(recipe: Recipe, config: ModelConfig, wanted: bool) -> Recipe:
    """The recipe that says whether the model is rotated, which one that feeds an MTP head its hidden states is not."""
    if recipe.rotate is not None:
        return recipe
    return replace(recipe, rotate=wanted and can_rotate(config) and recipe.speculation != MTP)


def _with_parts(recipe: Recipe, target: Target, layers: list[int]) -> Recipe:
    if recipe.parts:
        check_parts(layers, recipe.parts)
        return recipe
    return replace(recipe, parts=plan_parts(layers) if target.soc else 1)


def _with_thresholds(recipe: Recipe, target: Target, config: ModelConfig) -> Recipe:
    limits = resolved(recipe.validate, target.measured_kld, parameter_count(config))
    return replace(recipe, validate={**limits})


def check_match(recipe: Recipe, config: ModelConfig) -> None:
    """Raises RecipeError if the checkpoint is not of the shape the recipe was written for, or its context too long, and
    UnsupportedError for a family under a name that onnxruntime-genai does not know."""
    genai_type(config)
    facts = recipe.facts()
    expected = read_config(facts) if facts else config
    for field in _SHAPE_FIELDS:
        found, wanted = getattr(config, field), getattr(expected, field)
        if found != wanted:
            raise RecipeError(
                f"recipe {recipe.name} is for {recipe.model} with {field} {wanted}, the checkpoint has {found}: use "
                f"its own recipe, or the target's defaults with `toolkit export {recipe.target} --checkpoint …`"
            )
    longest = config.longest_context
    if recipe.context_length > longest:
        raise RecipeError(
            f"context_length {recipe.context_length} is more than the {longest} tokens that the checkpoint reads: "
            f"lower it with --set context_length={longest}"
        )


def shorten_context(recipe: Recipe, config: ModelConfig) -> Recipe:
    """A target's default context, cut to what the checkpoint allows, in whole windows."""
    length = min(recipe.context_length, config.longest_context)
    if recipe.window:
        length = length - length % recipe.window or length
    return replace(recipe, context_length=length)


def check_machine(plans: Sequence[ExportPlan], already_written_bytes: int) -> None:
    """Raises MachineError if disk or memory will not do for plans made in one pass, or if a bundle's cache could never
    be held here."""
    for plan in plans:
        _check_cache(plan)
    # Equal data files are written once.
    files = {(name, plan.layout.in_file(name)): nbytes for plan in plans for name, nbytes in plan.layout.files.items()}
    needed = sum(files.values()) + sum(plan.disk_needed_bytes - plan.layout.nbytes for plan in plans)
    free_disk = min(plan.disk_free_bytes for plan in plans)
    if free_disk + already_written_bytes < needed:
        raise MachineError(
            f"the disk has {free_disk >> 20} MiB free, the export needs {needed >> 20} MiB: "
            "free space or name another place with --out"
        )
    memory = max(plan.peak_memory_bytes for plan in plans)
    if (free := free_memory_bytes()) < memory:
        raise MachineError(
            f"{free >> 20} MiB of memory are free, the export needs about {memory >> 20} MiB: close other programs"
        )


def _check_cache(plan: ExportPlan) -> None:
    ram, length, window = ram_bytes(), plan.recipe.context_length, plan.recipe.window or 64
    if plan.opened_cache_bytes > ram:
        # Half of the memory: the weights have to be somewhere too.
        fits = max(length * ram // plan.kv_cache_bytes // 2 // window, 1) * window
        length = length * plan.opened_cache_bytes // plan.kv_cache_bytes
        raise MachineError(
            f"the KV cache of {length} tokens is {plan.opened_cache_bytes / 2**30:.1f} GiB, allocated whole at the "
            f"start, and this machine has {ram / 2**30:.1f} GiB: lower it with --set context_length={fits}"
        )
