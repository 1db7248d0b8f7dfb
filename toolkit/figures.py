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
    where `threshold` allows it; `sampled` are shares of questions, judged with their standard error. `tolerance` is how
    much worse it may be in a later report, `0.005` or `5%` of the earlier, unless one says otherwise; without one it is
    shown and not judged. Of `here` figures the machine decides, so that they are compared on equal ones alone.
    """

    name: str
    section: str
    label: str
    form: str
    at_least: bool = False
    threshold: bool = True
    sampled: bool = False
    key: str = ""
    tolerance: str = ""
    here: bool = False


_ROWS: Final = (
    Figure("weight_bytes", "quantization", "Weights", "bytes", threshold=False, tolerance="1%"),
    Figure("bits_per_weight", "quantization", "Bits per weight", "number", threshold=False, tolerance="1%"),
    Figure("mean_kld", "parity", "Mean KLD", "kld", tolerance="5%"),
    Figure("median_kld", "parity", "Median KLD", "kld", tolerance="10%"),
    Figure("p99_kld", "parity", "99th percentile KLD", "kld", tolerance="10%"),
    Figure("p999_kld", "parity", "99.9th percentile KLD", "kld", tolerance="25%"),
    Figure("top1_agreement", "parity", "Top-1 agreement", "share", at_least=True, tolerance="0.005"),
    Figure("max_abs_logit_error", "parity", "Max abs logit error", "number"),
    Figure("greedy_match_tokens", "parity", "Greedy tokens in agreement", "number", at_least=True),
    Figure("perplexity", "parity", "Perplexity", "perplexity", tolerance="1%"),
    Figure("reference_perplexity", "parity", "Perplexity of the reference", "perplexity", threshold=False),
    Figure("accuracy", "tasks", "Task accuracy", "share", at_least=True, sampled=True, tolerance="0"),
    Figure("accuracy_drop", "tasks", "Task accuracy drop", "points", sampled=True),
    Figure("ttft_s", "speed", "Time to first token", "seconds", tolerance="25%", here=True),
    Figure("prefill_tokens_per_s", "speed", "Prefill, tokens/s", "number", at_least=True, tolerance="15%", here=True),
    Figure("decode_tokens_per_s", "speed", "Decoding, tokens/s", "number", at_least=True, tolerance="15%", here=True),
    Figure("peak_rss_bytes", "speed", "Peak memory of a run", "bytes", tolerance="10%", here=True),
    Figure("hidden_rms_error", "simulator", "Hidden state RMS error", "number", tolerance="25%"),
    Figure("simulator_mean_kld", "simulator", "Mean KLD in the simulator", "kld", key="mean_kld", tolerance="10%"),
    Figure(
        "simulator_accuracy",
        "simulator.tasks",
        "Task accuracy in the simulator",
        "share",
        at_least=True,
        sampled=True,
        key="accuracy",
        tolerance="0",
    ),
    Figure(
        "simulator_accuracy_drop",
        "simulator.tasks",
        "Task accuracy drop in the simulator",
        "points",
        sampled=True,
        key="accuracy_drop",
    ),
    Figure(
        "conversion_s", "conversion", "Conversion", "seconds", threshold=False, key="wall_s", tolerance="50%", here=True
    ),
    Figure(
        "conversion_rss_bytes",
        "conversion",
        "Peak memory of the conversion",
        "bytes",
        threshold=False,
        key="peak_rss_bytes",
        tolerance="25%",
        here=True,
    ),
)
FIGURES: Final[dict[str, Figure]] = {row.name: row for row in _ROWS}


def threshold_names() -> tuple[str, ...]:
    """The figures that a recipe may set a threshold on."""
    return tuple(row.name for row in _ROWS if row.threshold)


def figures_in(section: str) -> tuple[Figure, ...]:
    """The figures of one section, in their order."""
    return tuple(row for row in _ROWS if row.section == section)
