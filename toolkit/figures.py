"""The figures of a report: one row each, from which thresholds, checks, words and formats are derived.

A new figure is a row here and a field of its section (`report/sections.py`), filled by whoever measures it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Figure:
    """One number of a report, and all that is known of it without measuring.

    `name` is what a recipe and a check call it, `section` where the report has it (`simulator.tasks` are the tasks of
    `simulator`) and `key` under which key there, the name itself unless given. `label` are the words for it. `form`
    says how it is written: `number`, `kld` (nats), `share` (of 1, as percent), `points` (a difference of shares),
    `perplexity`, `seconds` or `bytes`. Of a figure that is `at_least` more is better. A recipe may set a threshold
    where `threshold` allows it; `sampled` are shares of questions, judged with their standard error.
    """

    name: str
    section: str
    label: str
    form: str
    at_least: bool = False
    threshold: bool = True
    sampled: bool = False
    key: str = ""


_ROWS: Final = (
    Figure("mean_kld", "parity", "Mean KLD", "kld"),
    Figure("median_kld", "parity", "Median KLD", "kld"),
    Figure("p99_kld", "parity", "99th percentile KLD", "kld"),
    Figure("p999_kld", "parity", "99.9th percentile KLD", "kld"),
    Figure("top1_agreement", "parity", "Top-1 agreement", "share", at_least=True),
    Figure("max_abs_logit_error", "parity", "Max abs logit error", "number"),
    Figure("greedy_match_tokens", "parity", "Greedy tokens in agreement", "number", at_least=True),
    Figure("perplexity", "parity", "Perplexity", "perplexity"),
    Figure("reference_perplexity", "parity", "Perplexity of the reference", "perplexity", threshold=False),
    Figure("accuracy", "tasks", "Task accuracy", "share", at_least=True, sampled=True),
    Figure("accuracy_drop", "tasks", "Task accuracy drop", "points", sampled=True),
    Figure("ttft_s", "speed", "Time to first token", "seconds"),
    Figure("prefill_tokens_per_s", "speed", "Prefill, tokens/s", "number", at_least=True),
    Figure("decode_tokens_per_s", "speed", "Decoding, tokens/s", "number", at_least=True),
    Figure("peak_rss_bytes", "speed", "Peak memory of a run", "bytes"),
    Figure("hidden_rms_error", "simulator", "Hidden state RMS error", "number"),
    Figure("simulator_mean_kld", "simulator", "Mean KLD in the simulator", "kld", key="mean_kld"),
    Figure(
        "simulator_accuracy",
        "simulator.tasks",
        "Task accuracy in the simulator",
        "share",
        at_least=True,
        sampled=True,
        key="accuracy",
    ),
    Figure(
        "simulator_accuracy_drop",
        "simulator.tasks",
        "Task accuracy drop in the simulator",
        "points",
        sampled=True,
        key="accuracy_drop",
    ),
)
FIGURES: Final[dict[str, Figure]] = {row.name: row for row in _ROWS}


def threshold_names() -> tuple[str, ...]:
    """The figures that a recipe may set a threshold on."""
    return tuple(row.name for row in _ROWS if row.threshold)


def figures_in(section: str) -> tuple[Figure, ...]:
    """The figures of one section, in their order."""
    return tuple(row for row in _ROWS if row.section == section)
