"""Mean KLD over bits per weight, every row a point: one offline page with one SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.rows import Row

WIDTH, HEIGHT, LEFT, BOTTOM = 900, 560, 70, 50
COLOURS = {"llama.cpp": "#c2410c", "genai": "#7c3aed", "rtn": "#64748b", "fast": "#0f766e", "balanced": "#2563eb"}


def write_scatter(path: Path, title: str, rows: Sequence[Row]) -> Path:
    """Filled: the weights alone; ringed: as it runs. The vertical axis is logarithmic."""
    points = [(row, row.weights_alone.mean_kld, True) for row in rows]
    points += [(row, row.as_it_runs.mean_kld, False) for row in rows if row.as_it_runs]
    klds = [kld for _, kld, _ in points]
    low, high = math.floor(math.log10(min(klds))), math.ceil(math.log10(max(klds)))
    left, right = min(row.bits_per_weight for row in rows) - 0.1, max(row.bits_per_weight for row in rows) + 0.4

    def x(bits: float) -> float:
        return LEFT + (bits - left) / (right - left) * (WIDTH - LEFT - 20)

    def y(kld: float) -> float:
        return 20 + (high - math.log10(kld)) / (high - low) * (HEIGHT - BOTTOM - 20)

    parts = []
    for exponent in range(low, high + 1):
        at = y(10.0**exponent)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - 20}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">1e{exponent}</text>')
    for step in range(math.ceil(left * 2), math.floor(right * 2) + 1):
        parts.append(f'<text x="{x(step / 2):.1f}" y="{HEIGHT - 25}" text-anchor="middle">{step / 2:g}</text>')
    for row, kld, alone in points:
        word = row.name.split()[0]
        colour, name = COLOURS.get(word, "#be123c"), html.escape(row.name)
        style = f'fill="{colour}"' if alone else f'fill="none" stroke="{colour}" stroke-width="2"'
        parts.append(
            f'<circle cx="{x(row.bits_per_weight):.1f}" cy="{y(kld):.1f}" r="{4 if alone else 6}" {style}>'
            f"<title>{name}: {kld:.3g} at {row.bits_per_weight:.2f} bits</title></circle>"
        )
    for k, (word, colour) in enumerate({**COLOURS, "best": "#be123c"}.items()):
        parts.append(f'<circle cx="{WIDTH - 110}" cy="{30 + 20 * k}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - 98}" y="{34 + 20 * k}">{word}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 5}" text-anchor="middle">bits per weight</text>')
    text = (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title>"
        "<style>body{font:14px system-ui;margin:2em;max-width:920px}svg text{font:12px system-ui;fill:#334155}</style>"
        f"<h1>{html.escape(title)}: mean KLD to the checkpoint</h1>"
        "<p>Filled: the weights alone. Ringed: as it runs, activations rounded where the runtime does.</p>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%">{"".join(parts)}</svg>'
    )
    path.write_text(text, encoding="utf-8", newline="\n")
    return path
