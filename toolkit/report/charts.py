"""Charts as SVG text, drawn by hand and coloured by the classes of the page around them.

Horizontal positions are percentages and vertical ones pixels: a chart stretches to its column while type, strokes and
rows keep their size. Labels beside a plot hang outside its viewport; the page leaves the room and lets them overflow.
A series is told by its class: `bundle`, `plain` (plain 4-bit rounding), `reference`, `bound` (a limit, not measured).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

SHADES: Final = 9
_ROW: Final = 22
_VALUES_FIT: Final = 16
_SUPERSCRIPTS: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Cell:
    """One weight tensor of a layer; `sqnr_db` is None where it is not quantized, or is held exactly."""

    layer: int
    role: str
    bits: float
    sqnr_db: float | None


@dataclass(frozen=True)
class Scale:
    """Edges in dB, ascending and evenly spaced, of the steps a heat map is shaded in; `bits` is what they are for."""

    edges: tuple[float, ...]
    bits: float

    def shade(self, value: float) -> int:
        """0 (least error, highest value) to SHADES - 1; values beyond the edges take the outermost step."""
        steps = len(self.edges) - 1
        index = min(max(int((value - self.edges[0]) / (self.edges[1] - self.edges[0])), 0), steps - 1)
        # Shades equally far apart, from the middle of the ramp, keep equal steps in dB equal to the eye.
        stride = (SHADES - 1) // max(steps - 1, 1)
        return (SHADES - 1 - stride * (steps - 1)) // 2 + stride * (steps - 1 - index)


@dataclass(frozen=True)
class Distribution:
    """Counts [n] between log10 edges [n + 1]; `median`, `mean`, `p99`, `p999` in `marks` are plain values."""

    series: str
    name: str
    log10_edges: Sequence[float]
    counts: Sequence[float]
    marks: Mapping[str, float]


@dataclass(frozen=True)
class Bar:
    """One bar: length in the units of the axis, its printed value, and an interval to draw as a whisker."""

    series: str
    name: str
    value: float
    text: str
    interval: tuple[float, float] | None = None


def power_of_ten(exponent: int) -> str:
    """Writes a power of ten with a raised exponent, `10⁻⁶` for -6."""
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def heat_scale(cells: Iterable[Cell]) -> Scale | None:
    """At most SHADES round steps over the tensors of the commonest bit width, so that a few 8-bit ones do not
    flatten the rest; None if nothing is quantized.
    """
    known = [(cell.bits, cell.sqnr_db) for cell in cells if cell.sqnr_db is not None]
    if not known:
        return None
    bits = Counter(width for width, _ in known).most_common(1)[0][0]
    values = [value for width, value in known if width == bits]
    for step in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0):
        first, last = math.floor(min(values) / step), math.floor(max(values) / step) + 1
        if last - first <= SHADES:
            break
    return Scale(tuple(round(index * step, 1) for index in range(first, last + 1)), bits)


def heat_map(cells: Sequence[Cell], roles: Sequence[str], scale: Scale | None, label: str) -> str:
    """Layers across, roles down, one cell per tensor: shaded by SQNR, struck through where not quantized, with a
    marked corner where the bit width is not the scale's.
    """
    layers = max(cell.layer for cell in cells) + 1
    width, bottom = 100 / layers, len(roles) * _ROW
    parts = [_text(_clip(role, 12), "label", -8, row * _ROW + 15, "end", hint=role) for row, role in enumerate(roles)]
    for cell in cells:
        parts.append(_heat_cell(cell, width, roles.index(cell.role) * _ROW, scale, layers <= _VALUES_FIT))
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, layers) if layers / step <= 16)
    for layer in range(0, layers, step):
        parts.append(_text(str(layer), "tick", _percent((layer + 0.5) * width), bottom + 15, "middle"))
    parts.append(_text("layer", "tick", -8, bottom + 15, "end"))
    density = " values" if layers <= _VALUES_FIT else " dense" if layers > 40 else ""
    return _svg("heat" + density, bottom + 22, label, parts, f"max-width:{max(layers, 4) * 46}px")


def heat_legend(scale: Scale) -> str:
    """The steps of a heat map with their edges in dB, the most error first."""
    steps, parts = len(scale.edges) - 1, []
    for index, edge in enumerate(scale.edges):
        x = _percent(100 * index / steps)
        if index < steps:
            shade = f"heat-{scale.shade((edge + scale.edges[index + 1]) / 2)}"
            rect = {"x": x, "y": 0, "width": _percent(100 / steps), "height": 11, "class": shade}
            parts.append(_tag("rect", rect))
        parts.append(_text(f"{edge:g}", "tick", x, 25, "middle"))
    parts.append(_text("more error", "tick", -12, 10, "end"))
    parts.append(_text("less error", "tick", "100%", 10, dx=10))
    label = f"Colour scale from {scale.edges[0]:g} to {scale.edges[-1]:g} dB"
    return _svg("heat-legend", 30, label, parts, f"max-width:{steps * 34}px")


def histogram(series: Sequence[Distribution], label: str) -> str:
    """Densities per decade over a logarithmic axis, overlaid; below them a strip for each series from median to
    99.9th percentile with the mean (disc) and the 99th percentile (ring).
    """
    filled = [edge for one in series for edge in _filled_edges(one)]
    if not filled:
        return ""
    low, high = math.floor(min(filled)), math.ceil(max(filled))
    high += low == high
    height = 190
    peak = max(max(_densities(one), default=0.0) for one in series)
    parts = _density_grid(peak, height)
    step = 1 if high - low <= 8 else 2
    bottom = height + 18 * len(series) + 14
    for decade in range(low, high + 1):
        x = _percent((decade - low) * 100 / (high - low))
        parts.append(_tag("line", {"x1": x, "x2": x, "y1": height, "y2": bottom, "class": "grid"}))
        if (decade - low) % step == 0:
            parts.append(_text(power_of_ten(decade), "tick", x, bottom + 16, "middle"))
    curves = [_density_curve(one, low, high, peak * 1.06) for one in series]
    frame = {"x": 0, "y": 0, "width": "100%", "height": height, "viewBox": "0 0 100 100", "preserveAspectRatio": "none"}
    parts.append(_tag("svg", frame, *curves))
    parts.append(_tag("line", {"x1": 0, "x2": "100%", "y1": height, "y2": height, "class": "axis"}))
    for row, one in enumerate(series):
        parts.extend(_mark_strip(one, low, high, height + 16 + 18 * row))
    parts.append(_text("KLD of a position, nats", "tick", "50%", bottom + 36, "middle"))
    return _svg("histogram", bottom + 42, label, parts)


def horizontal_bars(groups: Sequence[tuple[str, Sequence[Bar]]], top: float, label: str) -> str:
    """Groups of bars from zero to `top`, each group under its name, each bar followed by its printed value."""
    parts: list[str] = []
    y = 0
    for name, bars in groups:
        parts.append(_text(_clip(name, 60), "label", 0, y + 13, hint=name))
        y += 20
        for row, bar in enumerate(bars):
            parts.extend(_bar(bar, y + row * 17, top))
        end = y + len(bars) * 17
        parts.append(_tag("line", {"x1": 0, "x2": 0, "y1": y - 3, "y2": end - 1, "class": "axis"}))
        y = end + 12
    return _svg("bars", max(y - 12, 20), label, parts)


def dot_strip(values: Sequence[float], low: float, high: float, label: str, centre: float | None = None) -> str:
    """Each value as a dot (or, more than 8, a tick) on a line from `low` to `high`, `centre` as a taller stroke."""
    span = (high - low) or 1.0
    parts = [_tag("line", {"x1": 0, "x2": "100%", "y1": 9, "y2": 9, "class": "grid"})]
    for value in values:
        x = _percent(min(max((value - low) * 100 / span, 0.0), 100.0))
        if len(values) > 8:
            parts.append(_tag("line", {"x1": x, "x2": x, "y1": 4, "y2": 14, "class": "tick-mark"}))
        else:
            parts.append(_tag("circle", {"cx": x, "cy": 9, "r": 4, "class": "dot"}))
    if centre is not None:
        x = _percent(min(max((centre - low) * 100 / span, 0.0), 100.0))
        parts.append(_tag("line", {"x1": x, "x2": x, "y1": 1, "y2": 17, "class": "centre"}))
    return _svg("strip", 18, label, parts)


def timeline(stages: Sequence[tuple[str, float, str]], total: float, label: str) -> str:
    """Draws stages (name, seconds, printed duration) one under the other; each bar begins where the last one ended."""
    parts, start = [], 0.0
    whole = max(total, sum(seconds for _, seconds, _ in stages)) or 1.0
    for row, (name, seconds, text) in enumerate(stages):
        y, x, end = row * _ROW, start * 100 / whole, (start + seconds) * 100 / whole
        parts.append(_text(_clip(name, 18), "label", -10, y + 14, "end", hint=name))
        bar = {"x": _percent(x), "y": y + 3, "width": _percent(end - x), "height": 14, "class": "bundle stage"}
        parts.append(_tag("rect", bar, _title(f"{name}: {text}")))
        if end <= 70:
            parts.append(_text(text, "value", _percent(end), y + 14, dx=6))
        elif x >= 30:
            parts.append(_text(text, "value", _percent(x), y + 14, "end", dx=-6))
        else:
            parts.append(_text(text, "value inside", _percent(x), y + 14, dx=8))
        start += seconds
    parts.insert(0, _tag("line", {"x1": 0, "x2": 0, "y1": 0, "y2": len(stages) * _ROW, "class": "axis"}))
    return _svg("timeline", len(stages) * _ROW + 2, label, parts)


def meter(share: float, series: str, label: str, limit: float | None = None) -> str:
    """A bar of `share` of its track (0 to 1, cut at 1), with a stroke at `limit` if there is one."""
    width = _percent(min(max(share, 0.0), 1.0) * 100)
    parts = [
        _tag("rect", {"x": 0, "y": 5, "width": "100%", "height": 8, "class": "track"}),
        _tag("rect", {"x": 0, "y": 5, "width": width, "height": 8, "class": series}),
    ]
    if limit is not None:
        x = _percent(limit * 100)
        parts.append(_tag("line", {"x1": x, "x2": x, "y1": 1, "y2": 17, "class": "centre"}))
    return _svg("meter", 18, label, parts)


def _heat_cell(cell: Cell, width: float, y: int, scale: Scale | None, show_value: bool) -> str:
    shade = "unquantized" if cell.sqnr_db is None or scale is None else f"heat-{scale.shade(cell.sqnr_db)}"
    exact = "exact" if cell.bits < 32 else "not quantized"
    value = exact if cell.sqnr_db is None else f"{cell.sqnr_db:.1f} dB"
    attributes = {"class": "cell", "data-layer": cell.layer, "data-role": cell.role}
    rect = {"x": _percent(cell.layer * width), "y": y, "width": _percent(width), "height": _ROW, "class": shade}
    middle = _percent((cell.layer + 0.5) * width)
    parts = [_title(f"layer {cell.layer}, {cell.role}: {value}, {cell.bits:g} bits"), _tag("rect", rect)]
    if shade == "unquantized":
        ends = {"x1": rect["x"], "y1": y + _ROW, "x2": _percent((cell.layer + 1) * width), "y2": y}
        parts.append(_tag("line", {**ends, "class": "void"}))
    odd = scale is not None and cell.sqnr_db is not None and cell.bits != scale.bits
    if show_value and cell.sqnr_db is not None:
        parts.append(_text(f"{cell.sqnr_db:.1f}", f"in-cell on-{shade}", middle, y + 15, "middle"))
    if odd:
        attributes = {"x": _percent((cell.layer + 1) * width), "y": y, "class": "odd"}
        corner = _tag("path", {"d": "M-7,1 L-1,1 L-1,7 Z", "class": f"on-{shade}"})
        parts.append(_tag("svg", attributes, corner))
    return _tag("g", attributes, *parts)


def _bar(bar: Bar, y: int, top: float) -> list[str]:
    length = _percent(min(max(bar.value, 0.0) / (top or 1.0), 1.0) * 100)
    rect = {"x": 0, "y": y, "width": length, "height": 13, "class": bar.series}
    parts, end = [_tag("rect", rect, _title(f"{bar.name}: {bar.text}"))], length
    if bar.interval is not None:
        low, high = (_percent(edge * 100 / (top or 1.0)) for edge in bar.interval)
        end = high
        middle = {"x1": low, "x2": high, "y1": y + 6.5, "y2": y + 6.5}
        parts.extend(_tag("line", {**middle, "class": style}) for style in ("halo", "whisker"))
        for x in (low, high):
            parts.append(_tag("line", {"x1": x, "x2": x, "y1": y + 3.5, "y2": y + 9.5, "class": "whisker"}))
    parts.append(_text(bar.text, "value", end, y + 11, dx=7))
    return parts


def _densities(one: Distribution) -> list[float]:
    total = sum(one.counts)
    edges = one.log10_edges
    return [
        count / total / (edges[index + 1] - edges[index]) if total else 0.0 for index, count in enumerate(one.counts)
    ]


def _filled_edges(one: Distribution) -> list[float]:
    filled = [index for index, count in enumerate(one.counts) if count > 0]
    return [one.log10_edges[filled[0]], one.log10_edges[filled[-1] + 1]] if filled else []


def _density_grid(peak: float, height: int) -> list[str]:
    step = next((s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if peak / s <= 4.5), 10.0)
    parts = []
    for index in range(int(peak / step) + 1):
        y = round(height - height * index * step / (peak * 1.06), 1)
        parts.append(_tag("line", {"x1": 0, "x2": "100%", "y1": y, "y2": y, "class": "grid"}))
        parts.append(_text(f"{index * step:.0%}", "tick", -8, y + 4, "end"))
    return parts


def _density_curve(one: Distribution, low: float, high: float, top: float) -> str:
    points = []
    for index, density in enumerate(_densities(one)):
        for edge in one.log10_edges[index : index + 2]:
            x = min(max((edge - low) * 100 / (high - low), 0.0), 100.0)
            points.append(f"{x:.3f},{100 - 100 * density / top:.3f}")
    if not sum(one.counts):
        return ""
    first, last = points[0].split(",")[0], points[-1].split(",")[0]
    outline = f"M{first},100 L" + " L".join(points) + f" L{last},100"
    return _tag("path", {"d": outline, "class": f"curve {one.series}"}, _title(one.name))


def _mark_strip(one: Distribution, low: float, high: float, y: int) -> list[str]:
    at = {
        name: _percent(min(max((math.log10(value) - low) * 100 / (high - low), 0.0), 100.0))
        for name, value in one.marks.items()
        if value > 0
    }
    parts = []
    if "median" in at and "p999" in at:
        parts.append(_tag("line", {"x1": at["median"], "x2": at["p999"], "y1": y, "y2": y, "class": "range"}))
    for name in ("median", "p999"):
        if name in at:
            parts.append(_tag("line", {"x1": at[name], "x2": at[name], "y1": y - 5, "y2": y + 5, "class": "range"}))
    for name, style in (("p99", "ring"), ("mean", "disc")):
        if name in at:
            parts.append(_tag("circle", {"cx": at[name], "cy": y, "r": 4, "class": style}))
    notes = ", ".join(f"{name} {value:.3g}" for name, value in one.marks.items())
    return [_tag("g", {"class": f"marks {one.series}"}, _title(f"{one.name}: {notes}"), *parts)] if parts else []


def _svg(kind: str, height: float, label: str, parts: Iterable[str], style: str = "") -> str:
    attributes: dict[str, str | float] = {"class": f"chart {kind}", "width": "100%", "height": height, "role": "img"}
    attributes["aria-label"] = label
    if style:
        attributes["style"] = style
    return _tag("svg", attributes, *parts)


def _tag(name: str, attributes: Mapping[str, object], *children: str) -> str:
    written = "".join(f' {key}="{escape(str(value))}"' for key, value in attributes.items())
    return f"<{name}{written}>{''.join(children)}</{name}>"


def _text(content: str, style: str, x: object, y: float, anchor: str = "start", dx: float = 0, hint: str = "") -> str:
    attributes = {"class": style, "x": x, "y": y, "text-anchor": anchor, "dx": dx}
    return _tag("text", attributes, _title(hint) if hint and hint != content else "", escape(content))


def _title(content: str) -> str:
    return _tag("title", {}, escape(content))


def _percent(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") + "%"


def _clip(content: str, length: int) -> str:
    return content if len(content) <= length else content[: length - 1] + "…"
