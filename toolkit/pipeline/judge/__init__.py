"""The proof story: the bundle beside its checkpoint's reference, on tokens, answers and time; then the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from toolkit.checkpoint.opened import Checkpoint
from toolkit.device.fitting import ON_NUMPY, Fitting
from toolkit.epcontext.htp import PROVIDER
from toolkit.pipeline.judge.answers import (
    ReferenceAnswers,
    answers_not_measured,
    asked_tasks,
    baseline_rows,
    questions_left_out,
    task_rows,
)
from toolkit.pipeline.judge.effort import Effort
from toolkit.pipeline.judge.parity import Compared, compare
from toolkit.pipeline.judge.reference import Reference
from toolkit.pipeline.judge.runtime import through_genai
from toolkit.pipeline.judge.simulator import Simulation, plan_simulation, run_simulation, simulated_task_rows
from toolkit.pipeline.judge.subject import Subject, open_subject
from toolkit.pipeline.judge.traced import NO_REFERENCE, TracedReference
from toolkit.pipeline.judge.verdict import thresholds
from toolkit.progress import counted
from toolkit.report.sections import NotMeasured, PartitionRow, Report
from toolkit.report.summary import read_report, write_report
from toolkit.report.verdict import judge
from toolkit.target import CPU_EP

__all__ = ["Effort", "judge_bundle"]


def judge_bundle(
    bundle: Path,
    checkpoint: Checkpoint,
    effort: Effort,
    progress: Callable[[str], None] = lambda _: None,
    fitting: Fitting = ON_NUMPY,
) -> Report:
    """Measures, rewrites report.json and report.html, returns the report; the reference runs on `fitting`.

    Raises BundleError or CheckpointError if either cannot be read or they do not belong together.
    """
    subject = open_subject(bundle, checkpoint, effort, counted(progress, "validate"), fitting)
    report = read_report(bundle, subject.manifest)
    asked, answers = asked_tasks(subject), ReferenceAnswers()
    read_before = checkpoint.source.bytes_read()
    simulation, (greedy, speed) = plan_simulation(subject), through_genai(subject)
    simulated_ids = simulation.sequences if isinstance(simulation, Simulation) else []
    beside = [greedy.prompt + greedy.made, *simulated_ids]
    traced = checkpoint.config.traced
    reference = TracedReference(subject, beside) if traced else Reference(subject, beside)
    compared = compare(subject, reference, greedy)
    parity, baseline, reasons = compared.parity, compared.baseline, list[NotMeasured]()
    if report.partition is not None:
        report = replace(report, partition=_partition(report.partition, compared))
        reasons += _not_seen(report.partition or (), subject)
    if isinstance(simulation, NotMeasured):
        reasons.append(simulation)
    elif simulation:
        assert isinstance(reference, Reference)
        simulated = run_simulation(subject, simulation, reference, reference.beside[1:])
        rows = simulated_task_rows(subject, asked, answers)
        reasons += [rows] if isinstance(rows, NotMeasured) else []
        answered = None if isinstance(rows, NotMeasured) else rows
        report = replace(report, simulator=replace(simulated, tasks=answered))
    if traced:
        reasons.append(NotMeasured("baseline", NO_REFERENCE))
    elif effort.baseline is False:
        reasons.append(NotMeasured("baseline", "left out by --no-baseline"))
    if asked:
        report = replace(report, tasks=task_rows(subject, asked, answers))
        if baseline and (plain := baseline_rows(subject, asked, answers)):
            baseline = replace(baseline, tasks=plain)
    reasons += answers_not_measured(subject, report.tasks or ())
    reasons += questions_left_out(subject.task_files, subject.effort)
    if isinstance(speed, NotMeasured):
        reasons.append(speed)
    else:
        report = replace(report, speed=speed)
    parity = replace(parity, bytes_read=checkpoint.source.bytes_read() - read_before)
    report = replace(report, parity=parity, baseline=baseline)
    verdict = judge(report, thresholds(subject.manifest, report))
    return write_report(bundle, replace(report, verdict=verdict), reasons)


def _partition(rows: Sequence[PartitionRow], compared: Compared) -> tuple[PartitionRow, ...]:
    """The stages with where ORT put the nodes of those that are the CPU's."""
    seen = []
    for row in rows:
        if row.ep == CPU_EP:
            counts = compared.placements[row.stage]
            row = replace(row, nodes_run=sum(counts.values()), nodes_on_ep=counts.get(CPU_EP, 0))
        seen.append(row)
    return tuple(seen)


def _not_seen(rows: Sequence[PartitionRow], subject: Subject) -> list[NotMeasured]:
    """Why it is not known where the nodes of an accelerator's stages run, and why there is no compiled binary."""
    others = sorted({row.ep for row in rows if row.ep != CPU_EP and not row.compiled})
    if not others:
        return []
    ran = "ran" if subject.here else "is not on this machine: every stage ran on the CPU"
    reason = f"{' and '.join(others)} {ran}; the nodes were checked against the operators it is known to take"
    compiled = [NotMeasured("partition.bin_bytes", "not compiled ahead of time: `toolkit compile`")]
    return [*(compiled if PROVIDER in others else []), NotMeasured("partition.nodes_on_ep", reason)]
