"""What commands print: plans, verdicts, notes and problems, as lines or as one JSON document."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolkit.typed_json import to_json

if TYPE_CHECKING:
    from toolkit.pipeline.described import DescribedPlan, PlannedCalibration
    from toolkit.pipeline.forecast import Phase
    from toolkit.report.sections import BaselineTaskRow, Check, Report, Speculated, TaskRow


def print_problems(problems: list[str], all_well: str, as_json: bool) -> None:
    """One line each, or that all is well; exit code 1 if there are any."""
    if as_json:
        click.echo(json.dumps({"passed": not problems, "problems": problems}, indent=2, ensure_ascii=False))
    else:
        click.echo("\n".join(problems) or all_well)
    if problems:
        sys.exit(1)


def print_plans(plans: Sequence[DescribedPlan], as_json: bool) -> None:
    """Prints plans as `--dry-run` shows them, as lines or as one JSON document."""
    if as_json:
        click.echo(one_document(plans))
        return
    for plan in plans:
        _print_plan(plan)


def one_document(parts: Sequence[object]) -> str:
    """One plan or report as a JSON document of its own, several as a list."""
    made = to_json(tuple(parts))
    return json.dumps(made[0] if isinstance(made, list) and len(made) == 1 else made, indent=2, ensure_ascii=False)


def print_exported(bundles: list[Path], as_json: bool) -> None:
    """Bundles that were made and not validated."""
    from toolkit.report.summary import load_report

    reports = [load_report(bundle) for bundle in bundles]
    for bundle, report in zip(bundles, reports, strict=True):
        click.echo(f"bundle: {bundle}", err=as_json)
        if not as_json:
            _print_notes(report)
        page = bundle / "report.html"
        click.echo(f"report: {page} (conversion alone; `toolkit validate` adds the proof)", err=as_json)
    if as_json:
        click.echo(one_document(reports))


def print_costs(plans: Sequence[DescribedPlan]) -> None:
    """What the exports are about to take, a line each, as an export begins."""
    for plan in plans:
        phases = plan.forecast or ()
        steps = ", ".join(f"{row.phase} {rough_time(row.forecast_s)}" for row in phases)
        whole = rough_time(sum(row.forecast_s for row in phases))
        memory = max((row.memory_bytes or 0 for row in phases), default=0)
        click.echo(
            f"{plan.recipe}, quality {plan.quality}: {_cost(plan.calibration)}; about {whole} here ({steps}), "
            f"{_mebibytes(memory)} of memory and {_mebibytes(plan.disk_needed_bytes)} of disk",
            err=True,
        )


def _print_phase(row: Phase) -> None:
    """One phase of a plan: its time, its peak of memory, what it adds on the disk, and what the time stands on."""
    sizes = {"of memory": row.memory_bytes, "of disk": row.disk_bytes}
    needs = "".join(f", {_mebibytes(nbytes)} {what}" for what, nbytes in sizes.items() if nbytes)
    click.echo(f"{row.phase}: about {rough_time(row.forecast_s)}{needs} ({row.basis})")


def _print_plan(plan: DescribedPlan) -> None:
    click.echo(f"{plan.recipe}: {plan.model}, {plan.weights / 1e9:.2f} G weights in {plan.layers} layers")
    if stored := plan.source:
        click.echo(f"source: {stored.file_type}, {stored.bits_per_weight:.2f} bits per weight")
    for stage in plan.stages:
        click.echo(f"stage {stage.stage}: {stage.file} on {stage.ep}")
    for file in plan.files:
        click.echo(f"file {file.name}: {file.bytes / 2**20:.1f} MiB")
    click.echo(f"bits per weight: {plan.bits_per_weight:.2f}")
    for note in (*(plan.idle_rules or ()), *([plan.outside] if plan.outside else ())):
        click.echo(f"note: {note}")
    click.echo(f"quality {plan.quality}: {_cost(plan.calibration)}")
    for row in plan.forecast or ():
        _print_phase(row)
    unasked = plan.opened_cache_bytes
    less = "" if unasked == plan.kv_cache_bytes else f", {_mebibytes(unasked)} where a request does not say how long"
    click.echo(f"KV cache at {plan.context_length} tokens: {_mebibytes(plan.kv_cache_bytes)} when run{less}")
    for context in plan.npu_contexts or ():
        how = "" if context.is_asked else f" (--set context_length={context.context_length})"
        memory, cache = _mebibytes(context.npu_memory_bytes), _mebibytes(context.kv_cache_bytes)
        compiled = "" if context.compile_s is None else f"; compiled in about {rough_time(context.compile_s)}"
        click.echo(
            f"NPU memory at {context.context_length} tokens{how}: about {memory}, of which cache {cache}{compiled}"
        )
    click.echo(f"peak memory of the export: about {_mebibytes(plan.peak_memory_bytes)}")
    if plan.compile_memory_bytes:
        click.echo(f"peak memory of compiling a part: about {_mebibytes(plan.compile_memory_bytes)}")
    if plan.download_bytes:
        click.echo(f"download: {_mebibytes(plan.download_bytes)}")
    click.echo(f"disk: {_mebibytes(plan.disk_needed_bytes)} needed, {_mebibytes(plan.disk_free_bytes)} free")


def _cost(calibration: PlannedCalibration | None) -> str:
    """Text and budget of a plan's calibration."""
    if calibration is None:
        return "rounding without data"
    bits = calibration.bits_per_weight
    return f"{calibration.tokens} tokens of text" + (f", up to {bits:g} bits per weight" if bits else "")


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MiB"


def rough_time(seconds: float) -> str:
    """Two digits, in the unit one would say it in."""
    if seconds >= 2 * 3600:
        return f"{round(seconds / 3600)} h"
    return f"{round(seconds / 60)} min" if seconds >= 120 else f"{max(round(seconds), 1)} s"


def print_verdict(bundle: Path, report: Report) -> None:
    """Parity, answers, speed, notes, checks, and where the report is."""
    parity, plain = report.parity, report.baseline
    if parity:
        beside = f", plain 4-bit {plain.mean_kld:.3g} and {plain.top1_agreement:.1%}" if plain else ""
        click.echo(
            f"parity on {parity.tokens} tokens: mean KLD {parity.mean_kld:.3g}, "
            f"top-1 {parity.top1_agreement:.1%}{beside}"
        )
        if alone := parity.weights_alone:
            click.echo(f"the weights alone: mean KLD {alone.mean_kld:.3g}, top-1 {alone.top1_agreement:.1%}")
    rounded = {row.name: row for row in plain.tasks or ()} if plain else {}
    for task in report.tasks or ():
        _print_task(task, task.name, rounded.get(task.name))
    if simulated := report.simulator:
        click.echo(
            f"{simulated.software}'s simulator beside the CPU on {simulated.tokens} tokens: "
            f"hidden states differ by {simulated.hidden_rms_error:.2g}, top-1 {simulated.top1_agreement:.1%}; beside "
            f"the checkpoint on {simulated.compared_tokens}: mean KLD {simulated.mean_kld:.3g}"
        )
        for task in simulated.tasks or ():
            _print_task(task, f"{task.name} in the simulator", None)
    if speed := report.speed:
        prefill, decode = speed.prefill_tokens_per_s, speed.decode_tokens_per_s
        click.echo(f"speed: {prefill:.0f} prefill, {decode:.1f} decode tokens/s, {speed.threads} threads")
        if speed.speculation:
            click.echo(said_of_guesses(speed.speculation))
    _print_notes(report)
    for check in report.verdict.checks if report.verdict else ():
        _print_check(check)
    click.echo(f"report: {bundle / 'report.html'}")


def _print_check(check: Check) -> None:
    """One line: the figure, what a sampled one is held to, and the threshold."""
    value = f"{check.value:.3g}" if check.value is not None else "was not measured"
    if check.bound is not None:
        error = f" ± {check.standard_error:.2g}" if check.standard_error is not None else ""
        side = "at most" if check.relation == ">=" else "at least"
        value += f"{error}, {side} {check.bound:.3g} with 95% confidence"
    click.echo(f"{'pass' if check.passed else 'FAIL'}: {check.name} {value} (threshold {check.threshold:g})")


def _print_task(task: TaskRow, name: str, plain: BaselineTaskRow | None) -> None:
    """Accuracy with its standard error and length of answers, the checkpoint's and plain 4-bit rounding's beside."""
    theirs = task.reference()
    error = f" (± {task.accuracy_se:.1%})" if task.accuracy_se is not None else ""
    reference = f", checkpoint {theirs.accuracy:.1%}" if theirs else ""
    rounded = f", plain 4-bit {plain.accuracy:.1%}" if plain else ""
    click.echo(f"{name}, {task.examples} questions: {task.accuracy:.1%}{error} right{reference}{rounded}")
    beside = f", checkpoint {theirs.mean_answer_tokens:.0f}" if theirs else ""
    click.echo(f"{name}, tokens of an answer: {task.mean_answer_tokens:.0f}{beside}")
    if task.truncated:
        share = f", checkpoint {theirs.truncated:.1%}" if theirs else ""
        limit = f"at {task.max_new_tokens} tokens (--max-new-tokens) or the context's end"
        click.echo(f"{name}, cut {limit}: {task.truncated:.1%}{share}")


def said_of_guesses(guessed: Speculated) -> str:
    """One line: what guessed, how much of it was right, and what that gave."""
    return (
        f"{guessed.method} speculation: {guessed.acceptance_rate:.0%} of guesses right, "
        f"{guessed.tokens_per_run:.2f} tokens a run"
    )


def print_note(line: str) -> None:
    """A line on stderr that is no error."""
    click.echo(f"note: {line}", err=True)


def _print_notes(report: Report) -> None:
    """What a reader of the verdict has to know of weights, memory, and of where the stages run."""
    weights = report.quantization
    if weights and weights.salient_inputs:
        spoils = "spoils, rotated as they are" if weights.rotated else "spoils"
        click.echo(
            f"note: {len(weights.salient_inputs)} norms have gains many times their median, which rounding without "
            f"data {spoils}: export with --quality balanced"
        )
    fallbacks = weights.calibration.fallbacks if weights and weights.calibration else ()
    for why, count in Counter(row.reason for row in fallbacks).items():
        were = "matrix was" if count == 1 else "matrices were"
        click.echo(f"note: {count} {were} searched, not solved by GPTQ: {why}")
    if cache := report.kv_cache:
        click.echo(f"KV cache: {cache.bytes / 2**20:.0f} MiB for {cache.context_length} tokens when run")
    for row in report.partition or ():
        for line in (*row.illegal, *row.conditions):
            click.echo(f"note: {line}")
    for name in ("partition.nodes_on_ep", "tasks.examples"):
        if reason := report.reason(name):
            click.echo(f"note: {reason}")
