"""Rows of files as a Markdown table, with what each is made of and what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.answering import Material
from benchmarks.peers.rows import Row
from toolkit.evaluate.answers import pairs_of
from toolkit.report.sections import Answered, Divergence

_HEAD = (
    *("file", "bits/weight", "KLD, weights alone", "as it runs", "99.9%", "top-1", "perplexity"),
    *("right answers", "tokens", "prefill, decode tokens/s", "made in s", "peak RSS, MiB"),
)


def table(
    material: Material,
    rows: Sequence[Row],
    left_out: Mapping[str, str],
    own: Answered | None,
    right: Sequence[int] = (),
) -> str:
    """Returns the table; `own` are the checkpoint's own answers, `right` those of them that are right."""
    tokens, others = sum(map(len, material.sequences)), sum(map(len, material.calibration_sequences))
    lines = [f"{tokens} tokens; peers are calibrated on {others} others. The checkpoint itself: {_answered(own)}", ""]
    lines += [_line(_HEAD), _line(["---"] * len(_HEAD)), *(_line(_cells(row)) for row in rows), ""]
    lines += [f"- {row.name}: {row.note}{_beside(row, material, right)}{_load(row)}" for row in rows]
    lines += [f"- {name}: left out: {reason}" for name, reason in left_out.items()]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row) -> list[str]:
    figures = row.as_it_runs or row.weights_alone
    speeds = (row.prefill_tokens_per_s, row.decode_tokens_per_s)
    return [
        row.name,
        f"{row.bits_per_weight:.2f}",
        f"{row.weights_alone.mean_kld:.3g}",
        _kld(row.as_it_runs),
        f"{figures.p999_kld:.3g}",
        f"{100 * figures.top1_agreement:.1f}%",
        f"{figures.perplexity:.4g}",
        _answered(row.answered),
        "-" if row.answered is None else f"{row.answered.mean_answer_tokens:.0f}",
        "-" if None in speeds else ", ".join(f"{speed:.1f}" for speed in speeds),
        f"{row.wall_s:.0f}",
        f"{row.peak_rss_bytes / 2**20:.0f}",
    ]


def _kld(figures: Divergence | None) -> str:
    return "-" if figures is None else f"{figures.mean_kld:.3g}"


def _answered(answers: Answered | None) -> str:
    """The share of right answers, its standard error, and the share that the limit cut."""
    if answers is None:
        return "-"
    error = "" if answers.accuracy_se is None else f" ± {100 * answers.accuracy_se:.1f}"
    return f"{100 * answers.accuracy:.1f}%{error} ({100 * answers.truncated:.0f}% cut)"


def _beside(row: Row, material: Material, right: Sequence[int]) -> str:
    """How many of the checkpoint's right answers became wrong, and the other way, with the standard error of that."""
    if row.answered is None or not right or material.task is None:
        return ""
    numbers = np.arange(len(material.task.questions))
    pairs = pairs_of(np.isin(numbers, row.right), np.isin(numbers, right))
    lost, won = pairs.right_to_wrong, pairs.wrong_to_right
    error = "" if pairs.accuracy_drop_se is None else f" ± {100 * pairs.accuracy_drop_se:.1f}"
    change = 100 * (won - lost) / numbers.size
    return f"; beside the checkpoint {lost} answers became wrong and {won} right, {change:+.1f}{error} points"


def _load(row: Row) -> str:
    said = ""
    if row.load is not None and row.load >= 1:
        said += f"; made at a load of {row.load:.1f}: its seconds say little"
    if row.timed_at_load is not None and row.timed_at_load >= 1:
        said += f"; timed at a load of {row.timed_at_load:.1f}: its tokens/s say little"
    return said
