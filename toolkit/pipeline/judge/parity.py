"""The bundle's logits beside its checkpoint's, and plain 4-bit rounding's: the report's `parity` and `baseline`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from toolkit.evaluate.parity import Comparison, matching_prefix
from toolkit.evaluate.positions import open_positions, rounds_activations
from toolkit.evaluate.rounded import PLAIN_BITS_PER_WEIGHT, PLAIN_NAME, plain_rounding
from toolkit.evaluate.session import continuations
from toolkit.pipeline.judge.subject import GREEDY_PROMPT, Subject
from toolkit.reference.decoder import head_logits, reference_hidden

_REFERENCE: Final = "numpy float32 forward of the checkpoint"
_WEIGHT_FIGURES: Final = ("mean_kld", "median_kld", "p99_kld", "p999_kld", "top1_agreement")
_GREEDY_NEW: Final = 32
# The bundle's logits are taken from one run over this many tokens, and again with the cache over the first of them.
_DECODED_TOKENS: Final = 48


@dataclass(frozen=True)
class Compared:
    """`parity` and, where it was wanted, `baseline` as the report has them; `placements` counts by stage and execution
    provider the nodes that ORT put there."""

    parity: dict[str, Any]
    baseline: dict[str, Any] | None
    placements: dict[str, dict[str, int]]


def compare(subject: Subject) -> Compared:
    """Compares the bundle with its checkpoint on the subject's sequences, token by token."""
    config, source = subject.checkpoint.config, subject.checkpoint.source
    sequences = subject.sequences
    prompt = sequences[0][:GREEDY_PROMPT]
    subject.progress("greedy tokens through onnxruntime-genai")
    (made,) = continuations(subject.bundle, [prompt], _GREEDY_NEW, not subject.here)
    hidden = reference_hidden(config, source, [*sequences, prompt + made], subject.progress)
    greedy = head_logits(config, source, hidden.pop()[len(prompt) - 1 : -1]).argmax(axis=-1)
    plain = plain_rounding(source) if subject.wants_baseline else None
    plain_hidden = reference_hidden(config, plain, sequences) if plain else None
    session, ours, theirs = open_positions(subject.bundle), Comparison(), Comparison()
    cached_error = 0.0
    subject.progress("logits of the bundle")
    for k, ids in enumerate(sequences):
        expected, actual = head_logits(config, source, hidden[k]), session.logits(ids)
        ours.add(expected, actual, ids)
        if k == 0:
            decoded = session.logits(ids[:_DECODED_TOKENS], prompt=min(len(ids), _DECODED_TOKENS // 2))
            cached_error = float(np.abs(decoded - expected[:_DECODED_TOKENS]).max())
        if plain and plain_hidden:
            theirs.add(expected, head_logits(config, plain, plain_hidden[k]), ids)
    placements = session.placements()
    del session
    parity = {"reference": _REFERENCE, **ours.figures()}
    parity["max_abs_logit_error"] = max(parity["max_abs_logit_error"], cached_error)
    parity |= {"greedy_match_tokens": matching_prefix(greedy.tolist(), made), "greedy_tokens": len(made)}
    if rounds_activations(subject.bundle):
        subject.progress("logits of the bundle's weights alone")
        parity["weights_alone"] = _weights_alone(subject, hidden)
    return Compared(parity, _baseline(theirs) if plain else None, placements)


def _baseline(comparison: Comparison) -> dict[str, Any]:
    figures = comparison.figures()
    del figures["tokens"], figures["reference_perplexity"]
    return {"name": PLAIN_NAME, "bits_per_weight": PLAIN_BITS_PER_WEIGHT, **figures}


def _weights_alone(subject: Subject, hidden: list[NDArray[np.float32]]) -> dict[str, float]:
    """The divergence that is left where products take their inputs as they are: what the weights themselves cost."""
    session, comparison = open_positions(subject.bundle, exact=True), Comparison()
    config, source = subject.checkpoint.config, subject.checkpoint.source
    for ids, last in zip(subject.sequences, hidden, strict=True):
        comparison.add(head_logits(config, source, last), session.logits(ids), ids)
    figures = comparison.figures()
    return {name: figures[name] for name in _WEIGHT_FIGURES}
