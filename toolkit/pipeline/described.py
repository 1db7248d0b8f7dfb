"""A plan as `--dry-run` shows it: what will be made, and the forecast of each phase; `--json` has the same fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from toolkit.checkpoint.stored_as import StoredAs
from toolkit.device.arrays import NUMPY, Device
from toolkit.partition.parts import BINARY_SHARE, layer_bytes
from toolkit.pipeline.forecast import Phase, compile_seconds, forecast
from toolkit.pipeline.judge.effort import Effort
from toolkit.pipeline.plan import ExportPlan
from toolkit.pipeline.work import measure_speed, speed_with
from toolkit.quant.formats import idle_rules
from toolkit.target import LONG_CONTEXT, NPU_CONTEXT

# What NPUs' recipes are offered with: short, for fast chats, their default, and long.
_USUAL_CONTEXTS: Final = (4096, NPU_CONTEXT, LONG_CONTEXT)


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a planned bundle: its name, its graph file, and what it runs on."""

    stage: str
    file: str
    ep: str
    device: str


@dataclass(frozen=True)
class PlannedFile:
    """One file of a planned bundle and its size, of a graph's only about."""

    name: str
    bytes: int


@dataclass(frozen=True)
class PlannedCalibration:
    """What is read for the weights' sake: tokens of text, the most bits a weight that its budget may spend, None where
    it has none, and the multiplications and additions it takes."""

    tokens: int
    bits_per_weight: float | None
    products: float


@dataclass(frozen=True)
class PlannedContext:
    """What a context of an NPU costs: its cache, allocated whole, that with the transformer's weights as the NPU has
    them, and compiling for it, where costs are asked for. `is_asked` is the recipe's own; the others are what `--set
    context_length=` may choose instead."""

    context_length: int
    kv_cache_bytes: int
    npu_memory_bytes: int
    is_asked: bool
    compile_s: float | None = None


@dataclass(frozen=True)
class DescribedPlan:
    """One export before it begins. What does not apply is None: rules that decide nothing, nodes that run outside their
    provider, calibration, compiling, a download, a GGUF file as the source."""

    recipe: str
    model: str
    target: str
    context_length: int
    layers: int
    weights: int
    stages: tuple[PlannedStage, ...]
    files: tuple[PlannedFile, ...]
    quality: str
    bits_per_weight: float
    idle_rules: tuple[str, ...] | None
    outside: str | None
    calibration: PlannedCalibration | None
    peak_memory_bytes: int
    compile_memory_bytes: int | None
    kv_cache_bytes: int
    opened_cache_bytes: int
    download_bytes: int | None
    disk_needed_bytes: int
    disk_free_bytes: int
    npu_contexts: tuple[PlannedContext, ...] | None = None
    forecast: tuple[Phase, ...] | None = None
    source: StoredAs | None = None


def described_with_costs(
    plans: Sequence[ExportPlan], effort: Effort | None, compiles: bool = True, on: Device = NUMPY
) -> list[DescribedPlan]:
    """Each plan with the forecast of its phases; the machine and the device `on` are measured once for all."""
    speed, shown = measure_speed(), []
    calibrating = speed_with(speed, on)
    for plan in plans:
        phases = forecast(plan, speed, effort, compiles, calibrating)
        rows = tuple(replace(phase, forecast_s=round(phase.forecast_s, 2)) for phase in phases)
        described = describe(plan)
        if plan.compile_memory_bytes and compiles and described.npu_contexts:
            contexts = tuple(
                replace(row, compile_s=round(compile_seconds(plan, speed, row.context_length), 2))
                for row in described.npu_contexts
            )
            described = replace(described, npu_contexts=contexts)
        shown.append(replace(described, forecast=rows))
    return shown


def describe(plan: ExportPlan) -> DescribedPlan:
    """A plan without a forecast: what is known from headers and rules alone."""
    recipe, config = plan.recipe, plan.checkpoint.config
    return DescribedPlan(
        recipe=recipe.name,
        model=recipe.model,
        target=recipe.target,
        context_length=recipe.context_length,
        layers=config.num_hidden_layers,
        source=plan.opened.stored_as,
        weights=plan.layout.weights(),
        stages=tuple(
            PlannedStage(stage.name, stage.file, stage.execution_provider, stage.device)
            for stage in plan.target.stages(recipe.window, recipe.parts)
        ),
        files=tuple(PlannedFile(name, nbytes) for name, nbytes in plan.files.items()),
        quality=recipe.quality,
        bits_per_weight=plan.bits_per_weight,
        idle_rules=None if plan.traced else tuple(idle_rules(config, recipe)) or None,
        outside=_outside(plan),
        calibration=_calibration(plan),
        peak_memory_bytes=plan.peak_memory_bytes,
        compile_memory_bytes=plan.compile_memory_bytes or None,
        kv_cache_bytes=plan.kv_cache_bytes,
        opened_cache_bytes=plan.opened_cache_bytes,
        download_bytes=plan.opened.download_bytes or None,
        disk_needed_bytes=plan.disk_needed_bytes,
        disk_free_bytes=plan.disk_free_bytes,
        npu_contexts=_npu_contexts(plan),
    )


def _calibration(plan: ExportPlan) -> PlannedCalibration | None:
    cost = plan.calibration_cost
    if cost is None:
        return None
    return PlannedCalibration(cost.tokens, plan.recipe.bits_per_weight or None, cost.work.products)


def _outside(plan: ExportPlan) -> str | None:
    """What of the model the target's provider is not known to take, None if all is taken."""
    if plan.target.form.head_norms or not plan.checkpoint.config.structure.qk_norm:
        return None
    ep = plan.target.accelerator.execution_provider
    return f"the norms over heads of q and k are not among the operators of {ep}: their nodes run on the CPU"


def _npu_contexts(plan: ExportPlan) -> tuple[PlannedContext, ...] | None:
    """The recipe's context and the usual ones beside it that the checkpoint reads; None where no NPU holds a cache."""
    if plan.target.accelerator.device != "npu":
        return None
    config, asked = plan.checkpoint.config, plan.recipe.context_length
    in_binary = BINARY_SHARE if plan.target.soc else 1.0
    weights = int(in_binary * sum(layer_bytes(plan.layout, config.num_hidden_layers)))
    usual = [length for length in _USUAL_CONTEXTS if length <= config.longest_context]
    a_token = plan.kv_cache_bytes // asked
    return tuple(
        PlannedContext(length, a_token * length, weights + a_token * length, length == asked)
        for length in sorted({asked, *usual})
    )
