"""report.html: what report.json says, on one page that needs nothing but itself.

It knows the keys of report.json and nothing of how they were measured. Every section and every figure may be absent;
what is absent is left out here and stands under "Not measured" with its reason.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, Template

from toolkit.report import charts
from toolkit.report.charts import Bar, Cell, Distribution
from toolkit.report.figures import (
    LABELS,
    format_bytes,
    format_date,
    format_figure,
    format_kld,
    format_number,
    format_percent,
    format_seconds,
    label_of,
)

Section = Mapping[str, Any]

_TEMPLATE: Final = "report.html.jinja"
_ROLES: Final = ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Of a row of `tasks`, for the bundle and, with `reference_` before, the checkpoint.
_ANSWER_FIGURES: Final = ("accuracy", "accuracy_se", "mean_answer_tokens", "truncated")
# The share of its allowance at which a check's bar ends: the limit itself stands at two thirds of the track.
_METER_END: Final = 1.5


def render_report(report: Mapping[str, Any]) -> str:
    """The page as HTML text; `report` is the content of report.json, with any subset of its sections.

    What UTF-8 cannot hold (a lone surrogate in a name) becomes `?`, so the text can always be written.
    """
    verdict = report.get("verdict") or {}
    parity, baseline = report.get("parity") or {}, report.get("baseline") or {}
    page: str = _template().render(
        report=report,
        verdict=verdict,
        cards=_cards(report),
        checks=[_check(check) for check in verdict.get("checks") or ()],
        quantization=_quantization(report.get("quantization") or {}),
        parity=_parity(parity, baseline),
        tasks=_tasks(report.get("tasks") or (), baseline),
        speed=_speed(report.get("speed") or {}),
        ceiling=_ceiling(report.get("ceiling") or (), report.get("speed") or {}),
        conversion=_conversion(report.get("conversion") or {}, report.get("machine") or {}),
        partition=_partition(report.get("partition") or ()),
    )
    return page.encode("utf-8", errors="replace").decode("utf-8")


@functools.cache
def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    formats = (format_bytes, format_percent, format_kld, format_seconds, format_number, format_date, label_of)
    environment.filters.update({format.__name__: format for format in formats})
    return environment.get_template(_TEMPLATE)


def _cards(report: Section) -> list[dict[str, str]]:
    """The key figures there are: label, value, unit and one line of context each."""
    quantization, parity = report.get("quantization") or {}, report.get("parity") or {}
    baseline, speed, conversion = (report.get(name) or {} for name in ("baseline", "speed", "conversion"))
    cards: list[dict[str, str]] = []

    def add(label: str, value: str, *notes: str | None, unit: str = "") -> None:
        cards.append({"label": label, "value": value, "unit": unit, "note": ", ".join(filter(None, notes))})

    def plain(name: str) -> str | None:
        return f"plain 4-bit {format_figure(name, baseline[name])}" if name in baseline else None

    if "bits_per_weight" in quantization:
        add("Bits per weight", f"{quantization['bits_per_weight']:.2f}", plain("bits_per_weight"))
    if "weight_bytes" in quantization:
        value, unit = format_bytes(quantization["weight_bytes"]).split(" ")
        bits = quantization.get("bits_per_weight")
        add("Weights", value, f"{format_percent(bits / 16)} of 16-bit" if bits else None, unit=unit)
    for name in ("mean_kld", "top1_agreement"):
        if name in parity:
            add(label_of(name), format_figure(name, parity[name]), plain(name))
    if "perplexity" in parity:
        reference = parity.get("reference_perplexity")
        note = f"reference {format_figure('perplexity', reference)}" if reference else None
        add("Perplexity", format_figure("perplexity", parity["perplexity"]), note)
    if tasks := report.get("tasks"):
        values = [_mean_accuracy(tasks, key) for key in ("accuracy", "reference_accuracy")]
        label = "Mean task accuracy" if len(tasks) > 1 else "Task accuracy"
        if values[0] is not None:
            add(label, format_percent(values[0]), f"reference {format_percent(values[1])}" if values[1] else None)
    if "decode_tokens_per_s" in speed:
        first = f"first token after {format_seconds(speed['ttft_s'])}" if "ttft_s" in speed else None
        add("Decoding", format_number(float(speed["decode_tokens_per_s"])), first, unit="tokens/s")
    if "wall_s" in conversion:
        peak = conversion.get("peak_rss_bytes")
        add("Conversion", format_seconds(conversion["wall_s"]), f"peak memory {format_bytes(peak)}" if peak else None)
    return cards


def _mean_accuracy(tasks: Sequence[Section], key: str) -> float | None:
    values = [task[key] for task in tasks if key in task]
    return statistics.fmean(values) if len(values) == len(tasks) else None


def _check(check: Section) -> dict[str, Any]:
    """A row of the checks table."""
    name, threshold, passed = check["name"], check["threshold"], check["passed"]
    at_least = check["relation"] == ">="
    row = {"name": name, "passed": passed, "limit": ("≥ " if at_least else "≤ ") + format_figure(name, threshold)}
    if "value" not in check:
        return {**row, "value": "not measured", "meter": ""}
    value = check["value"]
    if at_least and 0 <= threshold <= 1:
        used = _ratio(1 - value, 1 - threshold)
    else:
        used = _ratio(threshold, value) if at_least else _ratio(value, threshold)
    label = f"{format_percent(used)} of the limit used" if used <= _METER_END else "beyond the limit"
    meter = charts.meter(used / _METER_END, "pass" if passed else "fail", label, 1 / _METER_END)
    return {**row, "value": format_figure(name, value), "meter": meter}


def _ratio(value: float, limit: float) -> float:
    """`value` as a share of `limit`; past every meter where there is no allowance and it is exceeded."""
    if value <= 0:
        return 0.0
    return value / limit if limit > 0 else 2 * _METER_END


def _quantization(section: Section) -> dict[str, Any]:
    """The heat map over layers and roles with its legend, and the rows by role with their spread over layers."""
    tensors: Sequence[Section] = section.get("tensors") or ()
    cells = [Cell(t["layer"], t["role"], t["bits"], t.get("sqnr_db")) for t in tensors if t.get("layer") is not None]
    rows = section.get("by_role") or ()
    view: dict[str, Any] = {"present": bool(section), "rows": [], "heat_map": "", "strip_range": ""}
    scale = charts.heat_scale(cells)
    if cells:
        found = {cell.role for cell in cells}
        roles = [role for role in _ROLES if role in found] + sorted(found.difference(_ROLES))
        layers = max(cell.layer for cell in cells) + 1
        label = f"Signal to quantization noise of {len(cells)} weight tensors, {layers} layers by {len(roles)} roles"
        by_place = {(cell.layer, cell.role): cell for cell in cells}
        known = [cell for cell in cells if cell.sqnr_db is not None]
        view |= {
            "heat_map": charts.heat_map(cells, roles, scale, label),
            "legend": charts.heat_legend(scale) if scale else "",
            "scale_bits": scale.bits if scale else None,
            "mixed": any(scale and cell.bits != scale.bits for cell in known),
            "hatched": len(known) < len(cells),
            "roles": roles,
            "table": [(layer, [by_place.get((layer, role)) for role in roles]) for layer in range(layers)],
            "worst": min(known, key=lambda cell: cell.sqnr_db or 0.0, default=None),
            "strip_range": f"{scale.edges[0]:g} to {scale.edges[-1]:g} dB" if scale else "",
        }
    total = sum(row.get("bytes", 0) for row in rows)
    for row in rows:
        strip = _role_strip(row, tensors, scale) if scale else ""
        share = row["bytes"] / total if total and "bytes" in row else None
        view["rows"].append({**row, "strip": strip, "share": share})
    return {**section, **view, "notes": _quantization_notes(section)}


def _quantization_notes(section: Section) -> list[str]:
    """How the formats came about, and what a reader should know of them."""
    notes = []
    if made := section.get("calibration"):
        folded, inputs = len(made["folded"]), made["inputs"]
        budget = made.get("budget_bits_per_weight")
        spent = f"; {budget:g} bits per weight, spent where they help most" if budget else ""
        notes.append(
            f"Quality {made['quality']}: {made['tokens']:,} tokens of {made['text']}, channel scales folded into "
            f"{folded} of {inputs} inputs{spent}."
        )
        for fallback in made["fallbacks"]:
            notes.append(f"{fallback['tensor']} was searched, not solved: {fallback['reason']}.")
    if salient := section.get("salient_inputs"):
        turned = " Rotated for their sake, which mends a part." if section.get("rotated") else ""
        notes.append(
            f"Rounded without data, and {len(salient)} norms have gains many times their median: what reads such "
            f"channels suffers most.{turned} Export with --quality balanced."
        )
    return notes


def _role_strip(row: Section, tensors: Sequence[Section], scale: charts.Scale) -> str:
    """The tensors of one row by role on the axis of the heat map; empty for a bit width the axis is not for."""
    same = [t for t in tensors if all(t.get(key) == row.get(key) for key in ("role", "algorithm", "bits"))]
    values = [t["sqnr_db"] for t in same if "sqnr_db" in t]
    if not values or row.get("bits") != scale.bits:
        return ""
    label = f"{row['role']}: {len(values)} tensors from {min(values):.1f} to {max(values):.1f} dB"
    return charts.dot_strip(values, scale.edges[0], scale.edges[-1], label, statistics.median(values))


def _parity(parity: Section, baseline: Section) -> dict[str, Any]:
    """The distribution of KLD and the figures of the bundle beside those of plain 4-bit rounding."""
    names = [*LABELS][1:]
    rows = []
    for name in names:
        if name in parity or name in baseline:
            values = [format_figure(name, side[name]) if name in side else None for side in (parity, baseline)]
            if name == "greedy_match_tokens" and values[0] and "greedy_tokens" in parity:
                values[0] = f"{values[0]} of {parity['greedy_tokens']}"
            both = name.endswith("kld") and parity.get(name) and baseline.get(name)
            rows.append({"name": name, "values": values, "ratio": parity[name] / baseline[name] if both else None})
    series = [
        Distribution(
            style,
            title,
            side["kld_histogram"]["log10_edges"],
            side["kld_histogram"]["counts"],
            {mark: side[f"{mark}_kld"] for mark in ("median", "mean", "p99", "p999") if f"{mark}_kld" in side},
        )
        for style, title, side in (("bundle", "this bundle", parity), ("plain", "plain 4-bit", baseline))
        if side.get("kld_histogram")
    ]
    label = "Distribution of KLD per position: " + " and ".join(one.name for one in series)
    figure = charts.histogram(series, label) if series else ""
    alone = parity.get("weights_alone", {})
    figures = [f"{label_of(name).lower()} {format_figure(name, value)}" for name, value in alone.items()]
    shown = {"figure": figure, "series": series, "compared": bool(baseline), "section": parity, "alone": figures}
    return {"present": bool(rows), "rows": rows, **shown}


def _tasks(tasks: Sequence[Section], baseline: Section) -> dict[str, Any]:
    """Bars of accuracy per task: reference, this bundle, plain 4-bit rounding; and a row a task and side."""
    plain = {task["name"]: task for task in baseline.get("tasks") or ()}
    groups, rows, limits = [], [], set()
    for task in tasks:
        of_reference = {key: task.get(f"reference_{key}") for key in _ANSWER_FIGURES}
        sides = (
            ("reference", "reference", {**of_reference, "examples": task.get("examples", 0)}),
            ("bundle", "this bundle", task),
            ("plain", "plain 4-bit", plain.get(task["name"], {})),
        )
        bars = []
        for style, name, side in sides:
            if (value := side.get("accuracy")) is not None:
                interval = wilson_interval(value, side.get("examples", 0))
                bars.append(Bar(style, name, value, format_percent(value), interval))
                rows.append({"task": task["name"], "series": style, "side": name, **_answer_figures(side)})
                if style == "bundle" and "accuracy_drop_se" in task:
                    rows[-1]["drop"] = _drop(task)
        if "max_new_tokens" in task:
            limits.add(task["max_new_tokens"])
        examples = f", {task['examples']:,} examples" if "examples" in task else ""
        groups.append((f"{task['name']}{examples}", bars))
    described = "; ".join(name + ": " + ", ".join(f"{bar.name} {bar.text}" for bar in bars) for name, bars in groups)
    styles = {bar.series for _, bars in groups for bar in bars}
    figure = charts.horizontal_bars(groups, 1.0, f"Accuracy by task. {described}") if groups else ""
    detailed = any(row["tokens"] for row in rows)
    table = {"rows": rows if detailed else [], "drops": any("drop" in row for row in rows), "limits": sorted(limits)}
    return {"present": bool(groups), "figure": figure, "styles": styles, **table}


def _answer_figures(side: Section) -> dict[str, str]:
    """Accuracy with its standard error, tokens of an answer, and the share that was cut; empty where not known."""
    error, tokens, cut = (side.get(key) for key in _ANSWER_FIGURES[1:])
    accuracy = format_percent(side["accuracy"]) + (f" ± {format_percent(error)}" if error is not None else "")
    return {
        "accuracy": accuracy,
        "tokens": format_number(float(tokens)) if tokens is not None else "",
        "truncated": format_percent(cut) if cut is not None else "",
    }


def _drop(task: Section) -> str:
    """What quantizing took, with the standard error between the same questions answered twice."""
    drop = format_percent(task["reference_accuracy"] - task["accuracy"] + 0.0)
    return f"{drop} ± {format_percent(task['accuracy_drop_se'])}".replace("%", "")


def wilson_interval(share: float, examples: int) -> tuple[float, float] | None:
    """The 95% interval of a share of `examples` independent trials (Wilson 1927), None without examples."""
    if examples <= 0:
        return None
    z = 1.96
    scale = 1 + z * z / examples
    centre = (share + z * z / (2 * examples)) / scale
    spread = z * math.sqrt(max(share * (1 - share), 0.0) / examples + (z / examples) ** 2 / 4) / scale
    return max(centre - spread, 0.0), min(centre + spread, 1.0)


def _speed(section: Section) -> dict[str, Any]:
    """Medians, each with a strip of its runs on an axis at least 10% of the median wide."""
    runs: Sequence[Section] = section.get("runs") or ()
    figures = []
    for name, label, unit in (
        ("ttft_s", "Time to first token", ""),
        ("prefill_tokens_per_s", "Prefill", " tokens/s"),
        ("decode_tokens_per_s", "Decoding", " tokens/s"),
    ):
        if name not in section:
            continue
        write = format_seconds if name == "ttft_s" else lambda value: format_number(float(value))
        centre, values = section[name], [run[name] for run in runs if name in run]
        low = min([*values, 0.95 * centre])
        high = max([*values, 1.05 * centre])
        spread = f"{write(min(values))} to {write(max(values))}{unit} in {len(values)} runs" if len(values) > 1 else ""
        strip = charts.dot_strip(values, low, high, f"{label}: {spread}", centre) if spread else ""
        ends = (write(low), write(high))
        figures.append({"label": label, "value": write(centre) + unit, "strip": strip, "spread": spread, "ends": ends})
    return {"present": bool(section), "figures": figures, "section": section}


def _ceiling(rows: Sequence[Section], speed: Section) -> dict[str, Any]:
    """Bars of the decoding bound by device, and the speed measured here beside them."""
    groups = []
    if "decode_tokens_per_s" in speed:
        value = float(speed["decode_tokens_per_s"])
        groups.append(("Measured on this machine", [Bar("bundle", "measured", value, format_number(value))]))
    for row in rows:
        value = float(row["decode_tokens_per_s"])
        memory = f", {row['memory_bytes_per_s'] / 1e9:.0f} GB/s" if "memory_bytes_per_s" in row else ""
        groups.append((f"{row['device']}{memory}", [Bar("bound", "bound", value, f"≤ {format_number(value)}")]))
    top = max((bar.value for _, bars in groups for bar in bars), default=1.0)
    described = "; ".join(f"{name}: {bars[0].text}" for name, bars in groups)
    label = f"Upper bounds of decoding in tokens per second. {described}"
    return {"present": bool(rows), "figure": charts.horizontal_bars(groups, top, label) if rows else ""}


def _conversion(section: Section, machine: Section) -> dict[str, Any]:
    """The timeline of stages, and the peak memory as a share of the machine's."""
    stages = [(s["name"], float(s["wall_s"]), format_seconds(s["wall_s"])) for s in section.get("stages") or ()]
    described = ", ".join(f"{name} {text}" for name, _, text in stages)
    label = f"Stages of the conversion: {described}"
    figure = charts.timeline(stages, section.get("wall_s", 0.0), label) if stages else ""
    peak, ram = section.get("peak_rss_bytes"), machine.get("ram_bytes")
    memory = charts.meter(peak / ram, "bundle", f"{format_percent(peak / ram)} of memory used") if peak and ram else ""
    share = format_percent(peak / ram) if peak and ram else ""
    return {"present": bool(section), "figure": figure, "memory": memory, "share": share, "section": section}


def _partition(rows: Sequence[Section]) -> list[dict[str, Any]]:
    """The stages with the share of their nodes that the execution provider takes, as a small bar.

    Where ORT placed them if that was seen, else by the table; nodes that are the CPU's on purpose do not count.
    """
    view = []
    for row in rows:
        seen = "nodes_on_ep" in row
        taken = row.get("nodes_on_ep", row.get("nodes_legal"))
        whole = row.get("nodes_run", row.get("nodes")) if seen else row.get("nodes", 0) - row.get("nodes_outside", 0)
        meter = ""
        if taken is not None and whole:
            words = f"{format_percent(taken / whole)} of nodes for {row.get('ep', 'the EP')}"
            meter = charts.meter(taken / whole, "bundle", words)
        basis = "as run" if seen else "by table" if taken is not None else ""
        view.append({**row, "meter": meter, "taken": taken, "whole": whole, "basis": basis})
    return view
