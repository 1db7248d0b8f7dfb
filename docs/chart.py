"""Draws docs/chart.svg from LOG.md's table of `make bench-quality`: `python docs/chart.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
CHECKPOINT_PERCENT: Final = 88.3
# Rows of the table, and what the chart calls them.
ROWS: Final = {
    # Named by what the qualities were when they were measured: GPTQ on 8,192 tokens, scales searched on 4,096.
    "best 64, budget 4.9": "GPTQ, the default",
    "balanced 64, budget 4.9": "searched scales, folded",
    "fast 64": "fast",
    "llama.cpp q4_k_m+imatrix": "llama.cpp Q4_K_M with imatrix",
    "llama.cpp q4_0": "llama.cpp Q4_0",
    "genai default": "onnxruntime-genai's builder",
    "rtn 32 symmetric": "plain rounding",
}
_LEFT, _WIDTH, _STEP = 220, 360, 26


def measured(log: str) -> dict[str, tuple[float, float]]:
    """(bits a weight, percent of 1,000 questions answered right) of each row, from the first table that has it."""
    found: dict[str, tuple[float, float]] = {}
    for line in log.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 9 and cells[0] in ROWS and cells[6].endswith("%"):
            found.setdefault(cells[0], (float(cells[1]), float(cells[6].removesuffix("%"))))
    return found


def chart(log: str) -> str:
    """The chart as SVG: a bar a row, from 50 to 90%, and a line where the checkpoint is."""
    rows = measured(log)
    height = 44 + _STEP * len(ROWS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 {height}" role="img" font-family="sans-serif" '
        'font-size="13">',
        "<title>Answers of tiny-r1 that are right, by quantizer</title>",
        f'<rect width="680" height="{height}" fill="#ffffff"/>',
    ]
    for number, (row, label) in enumerate(ROWS.items()):
        bits, right = rows[row]
        y = 12 + _STEP * number
        colour = "#8a93a0" if row.startswith(("llama.cpp", "genai", "rtn")) else "#2a6fbb"
        parts += [
            f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end" fill="#222222">{label}</text>',
            f'<rect x="{_LEFT}" y="{y}" width="{_x(right) - _LEFT:.1f}" height="18" fill="{colour}"/>',
            f'<text x="{_x(right) + 6:.1f}" y="{y + 13}" fill="#222222">{right:.1f}% ({bits:.1f} bits)</text>',
        ]
    x, bottom = _x(CHECKPOINT_PERCENT), height - 26
    parts += [
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{bottom}" stroke="#c0392b" stroke-dasharray="4 3"/>',
        f'<text x="{x:.1f}" y="{height - 10}" text-anchor="end" fill="#c0392b">checkpoint {CHECKPOINT_PERCENT}%</text>',
        f'<text x="{_LEFT}" y="{height - 10}" fill="#555555">bars begin at 50%</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _x(percent: float) -> float:
    return _LEFT + _WIDTH * (percent - 50) / 40


if __name__ == "__main__":
    (ROOT / "docs" / "chart.svg").write_text(
        chart((ROOT / "LOG.md").read_text(encoding="utf-8")), encoding="utf-8", newline="\n"
    )
