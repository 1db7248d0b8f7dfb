"""The bundle's logits beside its checkpoint's, and plain 4-bit rounding's: the report's `parity` and `baseline`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from toolkit.evaluate.parity import Comparison
from toolkit.evaluate.positions import open_positions, rounds_activations
from toolkit.evaluate.rounded import PLAIN_BITS_PER_WEIGHT, PLAIN_NAME
from toolkit.pipeline.judge.reference import Reference
from toolkit.pipeline.judge.runtime import Greedy
from toolkit.pipeline.judge.subject import Subject
from toolkit.pipeline.judge.work import ALONE_TOKENS
from toolkit.report.sections import Baseline, Parity, WeightsAlone

_REFERENCE: Final = "numpy float32 forward of the checkpoint"
# The bundle's logits are taken from one run over this many tokens, and again with the cache over the first of them.
_DECODED_TOKENS: Final = 48


@dataclass(frozen=True)
class Compared:
    """`parity` and, where it was wanted, `baseline` as the report has them; `placements` counts by stage and execution
    provider the nodes that ORT put there."""

    parity: Parity
    baseline: Baseline | None
    placements: dict[str, dict[str, int]]


def compare(subject: Subject, reference: Reference, greedy: Greedy) -> Compared:
    """Compares the bundle with its checkpoint on the subject's sequences, token by token.

    The logits of the greedy tokens are the first that stand `beside` the text in the reference.
    """
    session, ours, theirs = open_positions(subject.bundle), Comparison(), Comparison()
    cached_error = 0.0
    subject.progress("logits of the bundle")
    for k, (ids, (expected, plain)) in enumerate(zip(subject.sequences, reference.text(), strict=True)):
        actual = session.logits(ids)
        ours.add(expected, actual, ids)
        if k == 0:
            decoded = session.logits(ids[:_DECODED_TOKENS], prompt=min(len(ids), _DECODED_TOKENS // 2))
            cached_error = float(np.abs(decoded - expected[:_DECODED_TOKENS]).max())
        if plain is not None:
            theirs.add(expected, plain, ids)
    placements = session.placements()
    del session
    alone = None
    if rounds_activations(subject.bundle):
        subject.progress("logits of the bundle's weights alone")
        alone = _weights_alone(subject, reference)
    figures = ours.figures()
    parity = Parity(
        **vars(replace(figures, max_abs_logit_error=max(figures.max_abs_logit_error, cached_error))),
        reference=_REFERENCE,
        tokens=ours.tokens,
        reference_perplexity=ours.reference_perplexity,
        greedy_match_tokens=greedy.matching(reference.beside[0]),
        greedy_tokens=len(greedy.made),
        weights_alone=alone,
    )
    return Compared(parity, _baseline(theirs) if subject.wants_baseline else None, placements)


def _baseline(comparison: Comparison) -> Baseline:
    return Baseline(**vars(comparison.figures()), name=PLAIN_NAME, bits_per_weight=PLAIN_BITS_PER_WEIGHT)


def _weights_alone(subject: Subject, reference: Reference) -> WeightsAlone:
    """The divergence that is left where products take their inputs as they are: what the weights themselves cost, on
    the first sequences of the text."""
    session, comparison = open_positions(subject.bundle, exact=True), Comparison()
    for ids, (expected, _) in zip(subject.sequences, reference.text(), strict=True):
        if comparison.tokens >= ALONE_TOKENS:
            break
        comparison.add(expected, session.logits(ids), ids)
    found = comparison.figures()
    figures = (found.mean_kld, found.median_kld, found.p99_kld, found.p999_kld, found.top1_agreement)
    return WeightsAlone(*figures, comparison.tokens)
