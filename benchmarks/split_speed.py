"""Speed of bundles beside each other: split_speed.py ROUNDS BUNDLE BUNDLE …, e.g. a cpu and a cpu-split one.

One `toolkit bench` of each in turn, ROUNDS times; medians of all runs and ratios to the first bundle.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

FIGURES = ("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s")


def bench(bundle: str) -> dict[str, Any]:
    """What `toolkit bench` says of a bundle, in a process of its own."""
    command = [sys.executable, "-m", "toolkit", "bench", bundle, "--repeat", "3", "--json"]
    measured: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return measured


def main(rounds: int, bundles: list[str]) -> None:
    """Benches the bundles in turn, `rounds` times, and prints medians, spreads and ratios to the first."""
    runs: dict[str, list[dict[str, float]]] = {bundle: [] for bundle in bundles}
    peaks: dict[str, float] = {}
    for _ in range(rounds):
        for bundle in bundles:
            measured = bench(bundle)
            runs[bundle] += measured["runs"]
            peaks[bundle] = measured["peak_rss_bytes"] / 2**20
    first = {key: statistics.median(run[key] for run in runs[bundles[0]]) for key in FIGURES}
    for bundle in bundles:
        print(f"{bundle}: peak RSS {peaks[bundle]:.0f} MiB")
        for key in FIGURES:
            values = sorted(run[key] for run in runs[bundle])
            median = statistics.median(values)
            spread = f"{values[0]:.3g} to {values[-1]:.3g}"
            print(f"  {key}: {median:.3g} ({spread}), {median / first[key]:.2f} of the first")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
