"""Figures of report.json as the page writes them: three significant digits, units, words for keys."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from typing import Final

from toolkit.figures import FIGURES
from toolkit.report.charts import power_of_ten


def format_bytes(nbytes: float) -> str:
    """`812 MiB`, `14.2 GiB`: three significant digits."""
    unit, size = ("GiB", 2**30) if nbytes >= 2**30 else ("MiB", 2**20)
    return f"{format_number(nbytes / size)} {unit}"


def format_percent(share: float) -> str:
    """A share of 1 with one decimal; with more where one would round a shortfall to `100.0%`."""
    decimals = 1
    while abs(share) < 1 and decimals < 4 and f"{abs(share):.{decimals}%}".startswith("100"):
        decimals += 1
    return f"{share:.{decimals}%}".replace("-", "−")


def format_kld(value: float) -> str:
    """Nats with three significant digits: `0.0123`, `1.06 × 10⁻⁶`."""
    if value and abs(value) < 1e-4:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{digits} × {power_of_ten(int(exponent))}".replace("-", "−")
    return format_number(value)


def format_number(value: float) -> str:
    """Three significant digits without an exponent, thousands grouped: `0.0123`, `41.2`, `1,234`."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    decimals = min(max(2 - math.floor(math.log10(abs(float(f"{value:.2e}")))), 0), 9)
    return f"{value:,.{decimals}f}".replace("-", "−")


def format_seconds(seconds: float) -> str:
    """`412 ms`, `3.21 s`, `4 min 12 s`, `1 h 3 min`."""
    if seconds < 1:
        return f"{format_number(seconds * 1000)} ms"
    if seconds < 60:
        return f"{format_number(float(seconds))} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_date(created: str) -> str:
    """An ISO time as `24 November 2026, 21:59 UTC`; anything else as it is."""
    try:
        moment = datetime.datetime.fromisoformat(created)
    except ValueError:
        return created
    zone = f" {moment.tzname()}" if moment.tzinfo else ""
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"


def label_of(name: str) -> str:
    """A key of report.json in words."""
    return FIGURES[name].label if name in FIGURES else (name[:1].upper() + name[1:]).replace("_", " ")


def format_figure(name: str, value: float) -> str:
    """A figure in its own form; `bits_per_weight` too, which is none that is judged."""
    form = FIGURES[name].form if name in FIGURES else "number"
    return _FORMS[form](value)


def _format_points(value: float) -> str:
    return format_percent(value).replace("%", " points")


def _format_perplexity(value: float) -> str:
    return f"{value:,.3f}"


_FORMS: Final[dict[str, Callable[[float], str]]] = {
    "number": format_number,
    "kld": format_kld,
    "share": format_percent,
    "points": _format_points,
    "perplexity": _format_perplexity,
    "seconds": format_seconds,
    "bytes": format_bytes,
}
