"""report.html: what a report says, on one page that needs nothing but itself.

It knows the sections of a report and nothing of how they were measured. What is absent is left out here and stands
under "Not measured" with its reason.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, Template

from toolkit.figures import FIGURES, figures_in
from toolkit.machine import Machine
from toolkit.report import charts
from toolkit.report.charts import Bar, Distribution
from toolkit.report.formatting import (
    format_bytes,
    format_date,
    format_figure,
    format_kld,
    format_number,
    format_percent,
    format_seconds,
    label_of,
)
from toolkit.report.page_weights import quantization_view
from toolkit.report.sections import (
    Answered,
    Baseline,
    CeilingRow,
    Check,
    Conversion,
    Divergence,
    Parity,
    PartitionRow,
    Report,
    Speed,
    TaskRow,
)
from toolkit.report.verdict import wilson_interval

_TEMPLATE: Final = "report.html.jinja"
# The share of its allowance at which a check's bar ends: the limit itself stands at two thirds of the track.
_METER_END: Final = 1.5


def render_report(report: Report) -> str:
    """Returns the page of a report as HTML text.

    What UTF-8 cannot hold (a lone surrogate in a name) becomes `?`, so the text can always be written.
    """
    page: str = template(_TEMPLATE).render(
        report=report,
        verdict=report.verdict,
        cards=_cards(report),
        checks=[_check(check) for check in report.verdict.checks] if report.verdict else [],
        quantization=quantization_view(report.quantization) if report.quantization else None,
        parity=_parity(report.parity, report.baseline) if report.parity else None,
        tasks=_tasks(report.tasks, report.baseline) if report.tasks else None,
        speed=_speed(report.speed) if report.speed else None,
        ceiling=_ceiling(report.ceiling, report.speed) if report.ceiling else None,
        conversion=_conversion(report.conversion, report.machine) if report.conversion else None,
        partition=[_partition(row) for row in report.partition or ()],
    )
    return page.encode("utf-8", errors="replace").decode("utf-8")


@functools.cache
def template(name: str) -> Template:
    """A page of this room, with the formats of figures as its filters."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    formats = (format_bytes, format_percent, format_kld, format_seconds, format_number, format_date, label_of)
    environment.filters.update({format.__name__: format for format in formats})
    return environment.get_template(name)


@dataclass(frozen=True)
class _Card:
    """A key figure: label, value, unit and one line of context."""

    label: str
    value: str
    unit: str
    note: str


def _card(label: str, value: str, *notes: str | None, unit: str = "") -> _Card:
    return _Card(label, value, unit, ", ".join(filter(None, notes)))


def _cards(report: Report) -> list[_Card]:
    """The key figures there are."""
    cards, baseline, parity = [], report.baseline, report.parity
    if weights := report.quantization:
        plain = f"plain 4-bit {format_number(baseline.bits_per_weight)}" if baseline else None
        cards.append(_card("Bits per weight", f"{weights.bits_per_weight:.2f}", plain))
        value, unit = format_bytes(weights.weight_bytes).split(" ")
        cards.append(_card("Weights", value, f"{format_percent(weights.bits_per_weight / 16)} of 16-bit", unit=unit))
    if parity:
        for name in ("mean_kld", "top1_agreement"):
            plain = f"plain 4-bit {format_figure(name, getattr(baseline, name))}" if baseline else None
            cards.append(_card(label_of(name), format_figure(name, getattr(parity, name)), plain))
        reference = f"reference {format_figure('perplexity', parity.reference_perplexity)}"
        cards.append(_card("Perplexity", format_figure("perplexity", parity.perplexity), reference))
    if tasks := report.tasks:
        known = [task.reference_accuracy for task in tasks if task.reference_accuracy is not None]
        note = f"reference {format_percent(statistics.fmean(known))}" if len(known) == len(tasks) else None
        label = "Mean task accuracy" if len(tasks) > 1 else "Task accuracy"
        cards.append(_card(label, format_percent(statistics.fmean(task.accuracy for task in tasks)), note))
    if speed := report.speed:
        first = f"first token after {format_seconds(speed.ttft_s)}"
        cards.append(_card("Decoding", format_number(speed.decode_tokens_per_s), first, unit="tokens/s"))
    if made := report.conversion:
        peak = f"peak memory {format_bytes(made.peak_rss_bytes)}"
        cards.append(_card("Conversion", format_seconds(made.wall_s), peak))
    return cards


@dataclass(frozen=True)
class _CheckView:
    """A row of the checks table; `note` says what a sampled figure is held to."""

    name: str
    passed: bool
    value: str
    limit: str
    note: str
    meter: str


def _check(check: Check) -> _CheckView:
    name, threshold, at_least = check.name, check.threshold, check.relation == ">="
    limit = ("≥ " if at_least else "≤ ") + format_figure(name, threshold)
    if check.value is None:
        return _CheckView(name, check.passed, "not measured", limit, "", "")
    value, note = format_figure(name, check.value), ""
    if check.bound is not None:
        error = f" ± {format_figure(name, check.standard_error)}" if check.standard_error is not None else ""
        value = value.removesuffix(" points").removesuffix("%") + error if error else value
        note = f"{'at most' if at_least else 'at least'} {format_figure(name, check.bound)} with 95% confidence"
    held = check.value if check.bound is None else check.bound
    if at_least and 0 <= threshold <= 1:
        used = _ratio(1 - held, 1 - threshold)
    else:
        used = _ratio(threshold, held) if at_least else _ratio(held, threshold)
    label = f"{format_percent(used)} of the limit used" if used <= _METER_END else "beyond the limit"
    meter = charts.meter(used / _METER_END, "pass" if check.passed else "fail", label, 1 / _METER_END)
    return _CheckView(name, check.passed, value, limit, note, meter)


def _ratio(value: float, limit: float) -> float:
    """`value` as a share of `limit`; past every meter where there is no allowance and it is exceeded."""
    if value <= 0:
        return 0.0
    return value / limit if limit > 0 else 2 * _METER_END


@dataclass(frozen=True)
class _ParityRow:
    """A figure of the bundle, and of plain 4-bit rounding where it has it."""

    name: str
    value: str
    plain: str | None
    ratio: float | None


@dataclass(frozen=True)
class _ParityView:
    """The distribution of KLD and the figures of the bundle beside those of plain 4-bit rounding."""

    section: Parity
    rows: list[_ParityRow]
    figure: str
    series: list[Distribution]
    alone: list[str]


def _parity(parity: Parity, baseline: Baseline | None) -> _ParityView:
    rows = []
    for name in (row.name for row in figures_in("parity")):
        value, plain = getattr(parity, name), getattr(baseline, name, None)
        text = format_figure(name, value)
        if name == "greedy_match_tokens":
            text = f"{text} of {parity.greedy_tokens}"
        ratio = value / plain if FIGURES[name].form == "kld" and plain else None
        rows.append(_ParityRow(name, text, None if plain is None else format_figure(name, plain), ratio))
    series = [_distribution("bundle", "this bundle", parity)]
    if baseline:
        series.append(_distribution("plain", "plain 4-bit", baseline))
    label = "Distribution of KLD per position: " + " and ".join(one.name for one in series)
    alone = vars(parity.weights_alone) if parity.weights_alone else {}
    described = [f"{label_of(name).lower()} {format_figure(name, value)}" for name, value in alone.items()]
    return _ParityView(parity, rows, charts.histogram(series, label), series, described)


def _distribution(series: str, name: str, side: Divergence) -> Distribution:
    marks = {"median": side.median_kld, "mean": side.mean_kld, "p99": side.p99_kld, "p999": side.p999_kld}
    return Distribution(series, name, side.kld_histogram.log10_edges, side.kld_histogram.counts, marks)


@dataclass(frozen=True)
class _AnswersRow:
    """What one side answered to a task: the bundle, its checkpoint, or plain 4-bit rounding."""

    task: str
    series: str
    side: str
    accuracy: str
    tokens: str
    truncated: str
    drop: str


@dataclass(frozen=True)
class _TasksView:
    """Bars of accuracy by task, a row a task and side, and what limited the answers."""

    figure: str
    styles: set[str]
    rows: list[_AnswersRow]
    drops: bool
    limits: list[int]


def _tasks(tasks: Sequence[TaskRow], baseline: Baseline | None) -> _TasksView:
    plain = {row.name: row for row in baseline.tasks or ()} if baseline else {}
    groups, rows = [], []
    for task in tasks:
        sides = (
            ("reference", "reference", task.reference()),
            ("bundle", "this bundle", task),
            ("plain", "plain 4-bit", plain.get(task.name)),
        )
        bars = []
        for series, name, side in sides:
            if side is not None:
                interval = wilson_interval(side.accuracy, task.examples)
                bars.append(Bar(series, name, side.accuracy, format_percent(side.accuracy), interval))
                drop = _drop(task) if series == "bundle" else ""
                rows.append(_answers(task.name, series, name, side, drop))
        groups.append((f"{task.name}, {task.examples:,} examples", bars))
    described = "; ".join(name + ": " + ", ".join(f"{bar.name} {bar.text}" for bar in bars) for name, bars in groups)
    figure = charts.horizontal_bars(groups, 1.0, f"Accuracy by task. {described}")
    styles = {bar.series for _, bars in groups for bar in bars}
    limits = sorted({task.max_new_tokens for task in tasks})
    return _TasksView(figure, styles, rows, any(row.drop for row in rows), limits)


def _answers(task: str, series: str, name: str, side: Answered, drop: str) -> _AnswersRow:
    error = "" if side.accuracy_se is None else f" ± {format_percent(side.accuracy_se)}"
    tokens, cut = format_number(side.mean_answer_tokens), format_percent(side.truncated)
    return _AnswersRow(task, series, name, format_percent(side.accuracy) + error, tokens, cut, drop)


def _drop(task: TaskRow) -> str:
    """What quantizing took, with the standard error between the same questions answered twice."""
    if task.reference_accuracy is None or task.accuracy_drop_se is None:
        return ""
    drop = format_percent(task.reference_accuracy - task.accuracy + 0.0)
    return f"{drop} ± {format_percent(task.accuracy_drop_se)}".replace("%", "")


@dataclass(frozen=True)
class _SpeedFigure:
    """A median with a strip of its runs on an axis at least 10% of the median wide."""

    label: str
    value: str
    strip: str
    spread: str
    ends: tuple[str, str]


@dataclass(frozen=True)
class _SpeedView:
    """The section itself and its three medians."""

    section: Speed
    figures: list[_SpeedFigure]


def _speed(section: Speed) -> _SpeedView:
    figures = []
    for name, label, unit in (
        ("ttft_s", "Time to first token", ""),
        ("prefill_tokens_per_s", "Prefill", " tokens/s"),
        ("decode_tokens_per_s", "Decoding", " tokens/s"),
    ):
        centre, values = float(getattr(section, name)), [float(getattr(run, name)) for run in section.runs]
        low, high = min([*values, 0.95 * centre]), max([*values, 1.05 * centre])
        shown = [format_figure(name, value) for value in (low, high, min(values, default=0), max(values, default=0))]
        spread = f"{shown[2]} to {shown[3]}{unit} in {len(values)} runs" if len(values) > 1 else ""
        strip = charts.dot_strip(values, low, high, f"{label}: {spread}", centre) if spread else ""
        figures.append(_SpeedFigure(label, format_figure(name, centre) + unit, strip, spread, (shown[0], shown[1])))
    return _SpeedView(section, figures)


def _ceiling(rows: Sequence[CeilingRow], speed: Speed | None) -> str:
    """Bars of the decoding bound by device, and the speed measured here beside them."""
    groups = []
    if speed:
        value = speed.decode_tokens_per_s
        groups.append(("Measured on this machine", [Bar("bundle", "measured", value, format_number(value))]))
    for row in rows:
        value = row.decode_tokens_per_s
        name = f"{row.device}, {row.memory_bytes_per_s / 1e9:.0f} GB/s"
        groups.append((name, [Bar("bound", "bound", value, f"≤ {format_number(value)}")]))
    top = max(bar.value for _, bars in groups for bar in bars)
    described = "; ".join(f"{name}: {bars[0].text}" for name, bars in groups)
    return charts.horizontal_bars(groups, top, f"Upper bounds of decoding in tokens per second. {described}")


@dataclass(frozen=True)
class _ConversionView:
    """The section, the timeline of its steps, and the peak memory as a share of the machine's."""

    section: Conversion
    figure: str
    memory: str
    share: str


def _conversion(section: Conversion, machine: Machine) -> _ConversionView:
    steps = [(step.name, step.wall_s, format_seconds(step.wall_s)) for step in section.stages]
    label = f"Stages of the conversion: {', '.join(f'{name} {text}' for name, _, text in steps)}"
    share = section.peak_rss_bytes / machine.ram_bytes
    text = format_percent(share)
    memory = charts.meter(share, "bundle", f"{text} of memory used")
    return _ConversionView(section, charts.timeline(steps, section.wall_s, label) if steps else "", memory, text)


@dataclass(frozen=True)
class _PartitionView:
    """A stage with the share of its nodes that the execution provider takes, as a small bar.

    Where ORT placed them if that was seen, else by the table; nodes that are the CPU's on purpose do not count.
    """

    row: PartitionRow
    taken: int
    whole: int
    basis: str
    meter: str


def _partition(row: PartitionRow) -> _PartitionView:
    if row.nodes_on_ep is not None:
        taken, whole, basis = row.nodes_on_ep, row.nodes if row.nodes_run is None else row.nodes_run, "as run"
    else:
        taken, whole, basis = row.nodes_legal, row.nodes - row.nodes_outside, "by table"
    meter = ""
    if whole:
        meter = charts.meter(taken / whole, "bundle", f"{format_percent(taken / whole)} of nodes for {row.ep}")
    return _PartitionView(row, taken, whole, basis, meter)
