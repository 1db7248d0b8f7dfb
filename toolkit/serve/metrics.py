"""What the server counts, in Prometheus' text format, under llama-server's names where it has them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from toolkit.serve.job import REFUSED, WRITTEN, Event


@dataclass
class Metrics:
    """Counts since the server began, and how many requests there are now."""

    prompt_tokens: int = 0
    tokens_predicted: int = 0
    prompt_seconds: float = 0.0
    tokens_predicted_seconds: float = 0.0
    processing: int = 0
    deferred: int = 0
    rejected: int = 0
    loads: int = 0
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)

    def count(self, model: str, last: Event, is_left: bool) -> None:
        """Adds one text by the event that ended it."""
        outcome = {WRITTEN: "written", REFUSED: "refused"}.get(last.kind, "left" if is_left else "failed")
        self.requests[model, outcome] += 1
        if last.written is not None:
            self.prompt_tokens += last.written.prompt_tokens
            self.tokens_predicted += last.written.new_tokens
            self.prompt_seconds += last.written.ttft_s
            self.tokens_predicted_seconds += last.written.decode_s

    def text(self) -> str:
        """Returns the page that Prometheus reads."""
        rows = [
            ("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            ("prompt_seconds_total", "counter", "Seconds to the first token.", self.prompt_seconds),
            ("tokens_predicted_total", "counter", "Tokens written.", self.tokens_predicted),
            ("tokens_predicted_seconds_total", "counter", "Seconds after first tokens.", self.tokens_predicted_seconds),
            ("requests_processing", "gauge", "Texts being written.", self.processing),
            ("requests_deferred", "gauge", "Requests that wait.", self.deferred),
            ("requests_rejected_total", "counter", "Requests refused because too many waited.", self.rejected),
            ("bundle_loads_total", "counter", "Times that a bundle was opened.", self.loads),
        ]
        lines = [
            f"# HELP toolkit_{name} {what}\n# TYPE toolkit_{name} {kind}\ntoolkit_{name} {value}"
            for name, kind, what, value in rows
        ]
        lines.append("# HELP toolkit_requests_total Requests by how they ended.\n# TYPE toolkit_requests_total counter")
        lines += [
            f'toolkit_requests_total{{model="{_escaped(model)}",outcome="{outcome}"}} {count}'
            for (model, outcome), count in sorted(self.requests.items())
        ]
        return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    """A label's value as the format spells it."""
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
