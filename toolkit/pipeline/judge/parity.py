"""The bundle's logits beside its checkpoint's, and plain 4-bit rounding's: the report's `parity` and `baseline`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

from toolkit.evaluate.parity import Comparison
from toolkit.evaluate.positions import open_positions, rounds_activations
from toolkit.evaluate.rounded import PLAIN_BITS_PER_WEIGHT, PLAIN_NAME
from toolkit.pipeline.judge.beside import Beside, Shared, Stretch, compare_beside, compare_stretch, joined
from toolkit.pipeline.judge.reference import Reference
from toolkit.pipeline.judge.runtime import Greedy
from toolkit.pipeline.judge.subject import Subject
from toolkit.pipeline.judge.traced import TracedReference
from toolkit.pipeline.judge.work import ALONE_TOKENS
from toolkit.reference.decoder import batched
from toolkit.report.sections import Baseline, Parity, WeightsAlone


@dataclass(frozen=True)
class Compared:
    """`parity` and, where it was wanted, `baseline` as the report has them; `placements` counts by stage and execution
    provider the nodes that ORT put there."""

    parity: Parity
    baseline: Baseline | None
    placements: dict[str, dict[str, int]]


def compare(subject: Subject, reference: Reference | TracedReference, greedy: Greedy) -> Compared:
    """Compares the bundle with its checkpoint on the subject's sequences, token by token.

    The logits of the greedy tokens are the first that stand `beside` the text in the reference.
    """
    subject.progress("logits of the bundle")
    found = _beside(subject, reference, subject.sequences, exact=False)
    ours, alone = found.ours, None
    if rounds_activations(subject.bundle):
        subject.progress("logits of the bundle's weights alone")
        alone = _weights_alone(subject, reference)
    figures = ours.figures()
    parity = Parity(
        **vars(replace(figures, max_abs_logit_error=max(figures.max_abs_logit_error, found.cached_error))),
        reference=reference.words,
        tokens=ours.tokens,
        reference_perplexity=ours.reference_perplexity,
        greedy_match_tokens=greedy.matching(reference.beside[0]),
        greedy_tokens=len(greedy.made),
        weights_alone=alone,
    )
    return Compared(parity, _baseline(found.theirs) if subject.wants_baseline else None, found.placements)


def _baseline(comparison: Comparison) -> Baseline:
    return Baseline(**vars(comparison.figures()), name=PLAIN_NAME, bits_per_weight=PLAIN_BITS_PER_WEIGHT)


def _weights_alone(subject: Subject, reference: Reference | TracedReference) -> WeightsAlone:
    """The divergence that is left where products take their inputs as they are: what the weights themselves cost, on
    the first sequences of the text."""
    before = accumulate((len(ids) for ids in subject.sequences), initial=0)
    some = [ids for ids, tokens in zip(subject.sequences, before, strict=False) if tokens < ALONE_TOKENS]
    comparison = _beside(subject, reference, some, exact=True).ours
    found = comparison.figures()
    figures = (found.mean_kld, found.median_kld, found.p99_kld, found.p999_kld, found.top1_agreement)
    return WeightsAlone(*figures, comparison.tokens)


def _beside(
    subject: Subject, reference: Reference | TracedReference, sequences: list[list[int]], exact: bool
) -> Beside:
    """The bundle, with exact activations or as it runs, beside its checkpoint on the first of the subject's sequences:
    here, or in stretches of one size whatever the number of a pool's processes."""
    pool = subject.fitting.pool
    if pool is None or isinstance(reference, TracedReference):
        logits = (
            (ids, (expected, None if exact else plain))
            for ids, (expected, plain) in zip(sequences, reference.text(), strict=False)
        )
        return compare_beside(open_positions(subject.bundle, exact), logits, decode=not exact)
    variants = tuple(reference.variants[:1] if exact else reference.variants)
    shared = Shared(subject.bundle.absolute(), exact, subject.checkpoint.config, subject.source, variants)
    stretches, end = list[Stretch](), 0
    for lengths in batched([len(ids) for ids in sequences]):
        some, end = slice(end, end + len(lengths)), end + len(lengths)
        hidden = [states[some] for states in reference.hidden[: len(variants)]]
        stretches.append(Stretch(sequences[some], hidden, first=not stretches and not exact))
    return joined(pool.map(compare_stretch, shared, stretches))
