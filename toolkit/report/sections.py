"""The sections of a report, frozen. A field is a key of report.json; docs/report.md explains each.

What was not measured is None here, absent in the file, and named in `not_measured` with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.machine import Machine
from toolkit.report.weight_sections import Quantization


@dataclass(frozen=True)
class StepTime:
    """One step of a conversion and the seconds it took."""

    name: str
    wall_s: float


@dataclass(frozen=True)
class CompiledPartCost:
    """What compiling one part of the transformer took; `stages` share its binary."""

    stages: tuple[str, ...]
    wall_s: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class Opened:
    """A finished bundle opened once by onnxruntime-genai, on the CPU: its graphs, tokenizer and chat template."""

    runtime: str
    load_s: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class Conversion:
    """What making the bundle took, and what was read and written."""

    wall_s: float
    peak_rss_bytes: int
    bytes_read: int
    bytes_written: int
    stages: tuple[StepTime, ...]
    packed_bytes_read: int | None = None
    in_one_pass_with: tuple[str, ...] | None = None
    compiled_parts: tuple[CompiledPartCost, ...] | None = None
    opened: Opened | None = None


@dataclass(frozen=True)
class PartitionRow:
    """One graph, what its execution provider is known to take of it, and where its nodes ran."""

    stage: str
    file: str
    ep: str
    device: str
    nodes: int
    nodes_legal: int
    nodes_outside: int
    illegal: tuple[str, ...]
    conditions: tuple[str, ...]
    table: str
    compiled: bool
    bin: str | None = None
    bin_bytes: int | None = None
    nodes_on_ep: int | None = None
    nodes_run: int | None = None


@dataclass(frozen=True)
class KvCache:
    """The cache that a run allocates whole before its first token."""

    context_length: int
    bytes: int


@dataclass(frozen=True)
class Histogram:
    """How many positions lie between each two of the edges, which are log10 of a KLD."""

    log10_edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Divergence:
    """How far next-token distributions are from the reference's, over all positions, in llama.cpp's terms."""

    max_abs_logit_error: float
    mean_kld: float
    median_kld: float
    p99_kld: float
    p999_kld: float
    top1_agreement: float
    perplexity: float
    kld_histogram: Histogram


@dataclass(frozen=True)
class WeightsAlone:
    """The divergence that is left where products take activations as they are, over the first `tokens`."""

    mean_kld: float
    median_kld: float
    p99_kld: float
    p999_kld: float
    top1_agreement: float
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Parity(Divergence):
    """The bundle beside its checkpoint, token by token."""

    reference: str
    tokens: int
    reference_perplexity: float
    greedy_match_tokens: int
    greedy_tokens: int
    weights_alone: WeightsAlone | None = None
    bytes_read: int | None = None


@dataclass(frozen=True)
class Answered:
    """What was answered to the questions of one task."""

    accuracy: float
    mean_answer_tokens: float
    truncated: float
    accuracy_se: float | None = None


@dataclass(frozen=True, kw_only=True)
class BaselineTaskRow(Answered):
    """One task, answered by plain 4-bit rounding of the checkpoint."""

    name: str
    examples: int


@dataclass(frozen=True, kw_only=True)
class Baseline(Divergence):
    """Plain 4-bit rounding of the same checkpoint, on the same tokens and questions."""

    name: str
    bits_per_weight: float
    tasks: tuple[BaselineTaskRow, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class TaskRow(Answered):
    """One task, answered by the bundle and, where its weights fit into memory, by the checkpoint."""

    name: str
    examples: int
    max_new_tokens: int
    reference_accuracy: float | None = None
    reference_accuracy_se: float | None = None
    reference_mean_answer_tokens: float | None = None
    reference_truncated: float | None = None
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None
    accuracy_drop_se: float | None = None

    def reference(self) -> Answered | None:
        """The checkpoint's answers, None where there are none."""
        accuracy, tokens, cut = self.reference_accuracy, self.reference_mean_answer_tokens, self.reference_truncated
        if accuracy is None or tokens is None or cut is None:
            return None
        return Answered(accuracy, tokens, cut, self.reference_accuracy_se)


@dataclass(frozen=True)
class Simulator:
    """The transformer in its vendor's simulator, beside the same graphs on the CPU and beside the checkpoint."""

    ep: str
    software: str
    stage: str
    parts: int
    hidden_rms_error: float
    top1_agreement: float
    tokens: int
    compared_tokens: int
    mean_kld: float
    p999_kld: float
    reference_top1_agreement: float
    greedy_match_tokens: int | None = None
    greedy_tokens: int | None = None
    tasks: tuple[TaskRow, ...] | None = None


@dataclass(frozen=True)
class SpeedRun:
    """One prompt and its continuation. `ttft_s` ends with the first token; decoding is timed after it."""

    ttft_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Speculated:
    """What guessing ahead came to: `ngram`, `draft` or `mtp`, the share of right guesses, tokens for each run."""

    method: str
    acceptance_rate: float
    tokens_per_run: float


@dataclass(frozen=True)
class Speed:
    """Medians over a few runs through onnxruntime-genai, after one that is not counted; the guesses are of them all."""

    runtime: str
    threads: int
    load_s: float
    prompt_tokens: int
    ttft_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_rss_bytes: int
    runs: tuple[SpeedRun, ...]
    speculation: Speculated | None = None


@dataclass(frozen=True)
class CeilingRow:
    """The speed that a device's memory bandwidth allows: a bound, not a measurement."""

    device: str
    memory_bytes_per_s: float
    source: str
    weight_bytes_per_token: int
    decode_tokens_per_s: float
    basis: str


@dataclass(frozen=True)
class Check:
    """A figure beside its threshold. A sampled one passes unless its `bound` misses the threshold too: the end of its
    one-sided 95% confidence interval that lies towards passing. A figure that was not measured has no value, and does
    not pass."""

    name: str
    relation: str
    threshold: float
    passed: bool
    value: float | None = None
    standard_error: float | None = None
    bound: float | None = None


@dataclass(frozen=True)
class Verdict:
    """Passed where there are checks and all of them pass."""

    passed: bool
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class NotMeasured:
    """A figure or section that is absent from a report, by its name there, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """report.json: what a bundle is, what making it took, what was measured; `digest` is the SHA-256 of the rest."""

    schema_version: int
    model: str
    target: str
    recipe: str
    synthetic: bool
    created: str
    machine: Machine
    not_measured: tuple[NotMeasured, ...]
    conversion: Conversion | None = None
    quantization: Quantization | None = None
    partition: tuple[PartitionRow, ...] | None = None
    kv_cache: KvCache | None = None
    parity: Parity | None = None
    baseline: Baseline | None = None
    tasks: tuple[TaskRow, ...] | None = None
    simulator: Simulator | None = None
    speed: Speed | None = None
    ceiling: tuple[CeilingRow, ...] | None = None
    form: str | None = None
    verdict: Verdict | None = None
    digest: str | None = None

    def reason(self, name: str) -> str | None:
        """Why a figure or section is absent; None if it is not named."""
        return next((entry.reason for entry in self.not_measured if entry.name == name), None)
