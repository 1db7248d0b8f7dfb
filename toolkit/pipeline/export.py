"""The export story, a line a step: plan, check, calibrate, pack, author, describe, open, rename."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.bundle.genai_config import genai_config, pad_token_id
from toolkit.bundle.manifest import CalibratedOn, Manifest, begin_manifest, write_manifest
from toolkit.bundle.speculative import SPECULATION_FILE, speculation_settings
from toolkit.checkpoint.opened import Checkpoint
from toolkit.device.arrays import NUMPY
from toolkit.device.fitting import ON_NUMPY, Fitting
from toolkit.evaluate.opens import open_apart
from toolkit.files import disk_errors, write_json
from toolkit.graph.builder import StageGraph
from toolkit.jit import require_compiler
from toolkit.machine import peak_rss_bytes
from toolkit.partition.data_files import Destination
from toolkit.partition.lower import lower
from toolkit.partition.pack import PackResult, pack_weights
from toolkit.pipeline.calibration import TokenizedText, calibrate, calibration_text, stored_ranges
from toolkit.pipeline.place import (
    CALIBRATION_FOLDER,
    check_place,
    checked_place,
    held,
    open_work,
    put_in_place,
    written_bytes,
)
from toolkit.pipeline.plan import ExportPlan, check_machine, plan_export
from toolkit.pipeline.standing import check_replaceable, check_reported, is_made
from toolkit.pipeline.tokenizer import TokenizerFiles, plan_tokenizer, write_tokenizer
from toolkit.pipeline.traced import plan_traced
from toolkit.pipeline.tuning import tune_packed, tuning_device
from toolkit.progress import counted
from toolkit.quant.ranges import ActivationRange
from toolkit.recipe import Recipe
from toolkit.report.sections import Conversion, KvCache, NotMeasured, StepTime
from toolkit.report.summary import begin_report, write_report
from toolkit.report.weight_sections import CalibrationOutcome
from toolkit.report.weights import ceiling_section, partition_section, quantization_section
from toolkit.soc import SOCS
from toolkit.speculation import NGRAM
from toolkit.typed_json import to_json


class _Clock:
    """Seconds of each named step."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.steps: list[StepTime] = []

    @contextmanager
    def step(self, name: str, steps: list[StepTime] | None = None) -> Iterator[None]:
        """Adds a step to those all bundles share, or to the `steps` of one."""
        begin = time.perf_counter()
        yield
        (self.steps if steps is None else steps).append(StepTime(name, time.perf_counter() - begin))


@dataclass(frozen=True)
class Order:
    """One bundle to make: a recipe, and where the bundle goes."""

    recipe: Recipe
    out: Path


@dataclass(frozen=True)
class _Begun:
    """A bundle in the making: its plan, its work folder and what its manifest says before there are files.

    `text` is what the plan is calibrated on, if anything is; `importance` weighs the errors of columns, `ranges` are
    those of uint16 activations, `calibration_outcome` is what the report says of both. `read_before` is how much of the
    checkpoint had been read when this began, `packed_bytes_read` how much of the data files was read back."""

    plan: ExportPlan
    out: Path
    partial: Path
    manifest: Manifest
    read_before: int
    text: TokenizedText | None = None
    importance: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    ranges: Mapping[str, ActivationRange] | None = None
    calibration_outcome: CalibrationOutcome | None = None
    packed_bytes_read: int = 0


def plan_exports(orders: Sequence[Order], checkpoint: Checkpoint, precision: str = "int4") -> list[ExportPlan]:
    """The plan of each bundle, all of one checkpoint. Raises ToolkitError if checkpoint or recipe will not do."""
    planned = plan_traced if checkpoint.config.traced else plan_export
    return [planned(order.recipe, checkpoint, order.out, precision) for order in orders]


def export_bundles(
    orders: Sequence[Order],
    checkpoint: Checkpoint,
    precision: str = "int4",
    progress: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Plans each recipe and makes its bundle, as `export_planned` does."""
    return export_planned(plan_exports(orders, checkpoint, precision), progress)


def export_planned(
    plans: Sequence[ExportPlan],
    progress: Callable[[str], None] = lambda _: None,
    force: bool = False,
    note: Callable[[str], None] = lambda _: None,
    fitting: Fitting = ON_NUMPY,
) -> list[Path]:
    """Each plan's bundle, resumed from `<out>.partial` if an earlier run left one.

    A bundle of equal inputs that is there already stays, and `note` is told so; a validated one of others is not
    replaced. `force` makes and replaces them all.

    Texts are computed on the device of `fitting`.

    The checkpoint is read and quantized once for all, and data files that are equal are one on the disk. A bundle ends
    with a report of the conversion; `judge` adds the proof. Raises ToolkitError before anything is written if the
    checkpoint or the machine will not do.
    """
    if any(plan.precision == "int4" for plan in plans):
        require_compiler()
    places = [plan.out for plan in plans]
    with disk_errors(*places), held(places):
        return _exported(plans, progress, force, note, fitting)


def check_exports(plans: Sequence[ExportPlan]) -> None:
    """Raises what the export would raise for the place, the tokenizer or the machine, and changes nothing."""
    places = [plan.out for plan in plans]
    with disk_errors(*places):
        for place in places:
            check_place(place)
        for plan in plans:
            if plan.tokenizer is None:
                plan_tokenizer(plan.opened)
        _require_torch(plans)
        check_machine(plans, written_bytes(places))


def _require_torch(plans: Sequence[ExportPlan]) -> None:
    """Raises MachineError where a plan tunes, and torch is not installed."""
    if any(plan.recipe.tuning_steps for plan in plans):
        tuning_device(NUMPY)


def _exported(
    plans: Sequence[ExportPlan],
    progress: Callable[[str], None],
    force: bool,
    note: Callable[[str], None],
    fitting: Fitting,
) -> list[Path]:
    """Makes the bundles, whose places nobody else writes meanwhile."""
    clock = _Clock()
    with clock.step("plan"):
        plans = [replace(plan, out=checked_place(plan.out)) for plan in plans]
        checkpoint = plans[0].checkpoint
        tokenizer = plans[0].tokenizer or plan_tokenizer(checkpoint)
        pad = pad_token_id(checkpoint.config, checkpoint.side)
        asked = [(plan, calibration_text(plan) if plan.calibration_cost else None) for plan in plans]
        wanted = asked if force else _missing(asked, note)
        if not wanted:
            return [plan.out for plan in plans]
        _require_torch([plan for plan, _ in wanted])
        check_machine([plan for plan, _ in wanted], written_bytes([plan.out for plan, _ in wanted]))
        begun = [_begin(plan, text) for plan, text in wanted]
    ready = [_calibrated(bundle, clock, progress, fitting) for bundle in begun]
    with clock.step("pack"):
        packed = _pack(ready, progress)
    ready, packed = _tuned(ready, packed, clock, progress, fitting)
    ready = [_ranged(bundle, clock, progress, fitting) for bundle in ready]
    for bundle, result in zip(ready, packed, strict=True):
        beside = [other.plan.recipe.name for other in begun if other.plan.out != bundle.plan.out]
        _finish(bundle, pad, result, tokenizer, clock, beside)
    # Last, so that whatever stops one of them leaves the others to go on from here.
    for bundle in begun:
        put_in_place(bundle.out)
    return [plan.out for plan in plans]


def _missing(
    asked: Sequence[tuple[ExportPlan, TokenizedText | None]], note: Callable[[str], None]
) -> list[tuple[ExportPlan, TokenizedText | None]]:
    """Those whose bundle does not stand there yet. Raises RecipeError for a validated one that would be lost."""
    missing = []
    for plan, text in asked:
        if is_made(plan, text.origin if text else None):
            check_reported(plan)
            note(f"{plan.out} was made of the same recipe, checkpoint and versions: kept (--force makes it anew)")
        else:
            check_replaceable(plan)
            missing.append((plan, text))
    return missing


def _calibrated(begun: _Begun, clock: _Clock, progress: Callable[[str], None], fitting: Fitting) -> _Begun:
    """The bundle with its plan's final formats and weights; itself where these need no text."""
    plan = begun.plan
    if begun.text is None or not plan.recipe.calibrated:
        return begun
    with clock.step(f"calibrate {plan.recipe.name}"):
        passes = 1 + any(unit.spec.rounded_by.solves for unit in plan.layout.matrices() if unit.spec)
        steps = passes * (plan.checkpoint.config.num_hidden_layers + 1)
        counting = counted(progress, "calibrate", steps)
        made = calibrate(plan, begun.text, begun.partial, begun.partial / CALIBRATION_FOLDER, counting, fitting)
    begun = replace(begun, manifest=_computed_on(begun.manifest, fitting))
    return replace(begun, plan=made.plan, importance=made.importance, calibration_outcome=made.section)


def _computed_on(manifest: Manifest, fitting: Fitting) -> Manifest:
    return replace(manifest, calibrated_on=CalibratedOn(fitting.on.name, fitting.on.software))


def _ranged(packed: _Begun, clock: _Clock, progress: Callable[[str], None], fitting: Fitting) -> _Begun:
    """The bundle with the ranges of its uint16 activations; itself where it has none."""
    plan = packed.plan
    if packed.text is None or not plan.target.form.qdq:
        return packed
    with clock.step(f"ranges {plan.recipe.name}"):
        work = packed.partial / CALIBRATION_FOLDER
        counting = counted(progress, "ranges", plan.checkpoint.config.num_hidden_layers)
        made = stored_ranges(plan, packed.text, packed.partial, work, counting, fitting)
    packed, known = replace(packed, manifest=_computed_on(packed.manifest, fitting)), made.section
    if packed.calibration_outcome:
        known = replace(packed.calibration_outcome, activations=known.activations, ranges_s=known.ranges_s)
    return replace(packed, ranges=made.ranges, calibration_outcome=known, packed_bytes_read=made.packed_bytes_read)


def _pack(ready: Sequence[_Begun], progress: Callable[[str], None]) -> list[PackResult]:
    """One pass over the checkpoint for all bundles without calibration, rotated ones apart, and one for each of the
    others, whose weights are folded for it alone."""
    results: dict[Path, PackResult] = {}
    together = [
        [b for b in ready if not b.calibration_outcome and b.plan.recipe.rotate == turned] for turned in (False, True)
    ]
    for group in [*together, *([bundle] for bundle in ready if bundle.calibration_outcome)]:
        if group:
            destinations = [Destination(bundle.plan.layout, bundle.partial) for bundle in group]
            source, importance = group[0].plan.checkpoint.source, group[0].importance
            made = pack_weights(source, destinations, counted(progress, "pack", len(source.names())), importance)
            results |= {bundle.out: result for bundle, result in zip(group, made, strict=True)}
    return [results[bundle.out] for bundle in ready]


def _tuned(
    packed: Sequence[_Begun],
    results: Sequence[PackResult],
    clock: _Clock,
    progress: Callable[[str], None],
    fitting: Fitting,
) -> tuple[list[_Begun], list[PackResult]]:
    """The bundles and what became of their weights, those tuned whose recipe asks for it."""
    done, made = [], []
    for bundle, result in zip(packed, results, strict=True):
        known, steps = bundle.calibration_outcome, bundle.plan.recipe.tuning_steps
        if known and bundle.text and steps:
            with clock.step(f"tune {bundle.plan.recipe.name}"):
                work, counting = bundle.partial / CALIBRATION_FOLDER, counted(progress, "tune", steps)
                on = tuning_device(fitting.on)
                tuned = tune_packed(bundle.plan, bundle.text, bundle.partial, work, counting, on)
                bundle = replace(bundle, calibration_outcome=replace(known, tuned=tuned))
                # Every tensor is there: this only hashes what is stored now.
                (result,) = _pack([bundle], lambda _: None)
        done.append(bundle)
        made.append(result)
    return done, made


def _begin(plan: ExportPlan, text: TokenizedText | None) -> _Begun:
    checkpoint = plan.checkpoint
    origin = text.origin if text else None
    manifest = begin_manifest(plan.recipe, plan.precision, checkpoint, plan.stop_tokens, origin)
    request = {"manifest": to_json(manifest), "layout": plan.layout.digest()}
    partial = open_work(plan.out, json.dumps(request))
    return _Begun(plan, plan.out, partial, manifest, checkpoint.source.bytes_read(), text)


def _graphs(begun: _Begun, pad: int) -> list[StageGraph]:
    """The graphs of the bundle: written from its layout, or the one that was traced."""
    plan = begun.plan
    if plan.traced is not None:
        return [plan.traced]
    return lower(plan.checkpoint.config, plan.layout, plan.target, plan.recipe, pad, begun.ranges)


def _finish(
    begun: _Begun, pad: int, packed: PackResult, tokenizer: TokenizerFiles, clock: _Clock, beside: list[str]
) -> None:
    """Graphs, settings, manifest and report around the data files."""
    plan, partial, steps = begun.plan, begun.partial, list(clock.steps)
    with clock.step("author", steps):
        graphs = _graphs(begun, pad)
        for graph in graphs:
            graph.save(partial)
        tokenizer_files = write_tokenizer(tokenizer, plan.checkpoint, plan.stop_tokens, partial)
        stop_ids = [token.id for token in plan.stop_tokens]
        config, length = plan.checkpoint.config, plan.recipe.context_length
        settings = genai_config(config, plan.checkpoint.side, stop_ids, length, graphs)
        write_json(partial / names.GENAI_CONFIG_FILE, settings)
        guessing = [SPECULATION_FILE] if plan.recipe.speculation == NGRAM else []
        for name in guessing:
            write_json(partial / name, speculation_settings(NGRAM))
    with clock.step("hash", steps):
        graph_files = [graph.stage.file for graph in graphs]
        made = [*graph_files, *packed.sha256, names.GENAI_CONFIG_FILE, *guessing, *tokenizer_files]
        described = replace(begun.manifest, changed=tokenizer.changed)
        manifest = write_manifest(partial, described, plan.checkpoint, made, packed.sha256)
    with clock.step("open", steps):
        opened = open_apart(partial, tokenizer.words)
    bandwidth = ceiling_section(plan.layout, SOCS[plan.recipe.soc]) if plan.recipe.soc else None
    report = replace(
        begin_report(manifest),
        quantization=replace(
            quantization_section(plan.layout, packed.errors),
            calibration=begun.calibration_outcome,
            salient_inputs=tuple(plan.salient_inputs) or None,
            rotated=True if plan.recipe.rotate else None,
            source=plan.opened.stored_as,
        ),
        partition=partition_section(graphs),
        ceiling=bandwidth,
        kv_cache=KvCache(plan.recipe.context_length, plan.kv_cache_bytes),
        conversion=Conversion(
            wall_s=time.perf_counter() - clock.start,
            peak_rss_bytes=peak_rss_bytes(),
            bytes_read=plan.checkpoint.source.bytes_read() - begun.read_before,
            packed_bytes_read=packed.bytes_read + begun.packed_bytes_read,
            bytes_written=sum(entry.bytes for entry in manifest.files),
            stages=tuple(steps),
            in_one_pass_with=tuple(beside) or None,
            opened=None if isinstance(opened, NotMeasured) else opened,
        ),
    )
    write_report(partial, report, [opened] if isinstance(opened, NotMeasured) else [])
