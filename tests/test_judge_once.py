"""Validation runs the reference once: beside the straightforward computation, and by the bytes it reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.graphs import EIGHT_BITS, export_bundle
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.evaluate.parity import Comparison, matching_prefix
from toolkit.evaluate.positions import open_positions
from toolkit.evaluate.rounded import plain_rounding
from toolkit.evaluate.session import continuations
from toolkit.pipeline.judge import Effort, judge_bundle
from toolkit.pipeline.judge.reference import Reference
from toolkit.pipeline.judge.subject import open_subject
from toolkit.recipe import load_recipe
from toolkit.reference import decoder
from toolkit.reference.beside import Forward, exact, hidden_beside, logits_beside
from toolkit.reference.decoder import head_logits, reference_hidden, reference_logits

SEQUENCES = [[5, 6, 7, 8, 9, 5, 5], [900, 3], [int(i) for i in np.random.default_rng(1).integers(0, 1024, 40)]]
EFFORT = Effort(tokens=700, examples=3, max_new_tokens=6, speed=False, baseline=True)


@pytest.fixture(scope="module")
def bundle(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = load_recipe("tiny-r1-cpu", EIGHT_BITS)
    return export_bundle(recipe, open_checkpoint(tiny_r1), tmp_path_factory.mktemp("judged") / "b")


@pytest.fixture
def checkpoint(tiny_r1: Path) -> Checkpoint:
    return open_checkpoint(tiny_r1)


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_side_by_side_is_one_after_the_other(
    checkpoint: Checkpoint, tiny_r1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "HEAD_ROWS", 300)
    config, source = checkpoint.config, checkpoint.source
    runs = [Forward(exact, SEQUENCES), Forward(plain_rounding, SEQUENCES[1:])]
    hidden = hidden_beside(config, source, runs)
    logits = logits_beside(config, source, [exact, plain_rounding], [np.concatenate(states) for states in hidden])
    # Rows of the embedding and, once each, everything else.
    assert source.bytes_read() <= _weight_bytes(tiny_r1)
    for run, states, made in zip(runs, hidden, logits, strict=True):
        expected = reference_hidden(config, run.variant(source), list(run.sequences))
        for ours, theirs in zip(states, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        alone = np.concatenate([head_logits(config, run.variant(source), states) for states in expected])
        np.testing.assert_allclose(made, alone, rtol=1e-4, atol=1e-4)
    assert not np.allclose(logits[0][len(SEQUENCES[0]) :], logits[1], atol=1e-2)


def test_groups_are_the_whole(bundle: Path, checkpoint: Checkpoint) -> None:
    subject = open_subject(bundle, checkpoint, EFFORT, lambda _: None)
    beside = [subject.sequences[0][:9], [1, 2, 3]]
    whole = Reference(subject, beside, logits_bytes=1 << 30)
    parts = Reference(subject, beside, logits_bytes=1)
    assert len(whole._groups) == 1 and len(parts._groups) == len(subject.sequences) > 1
    for made in (whole, parts):
        for ids, logits in zip(beside, made.beside, strict=True):
            (alone,) = reference_logits(checkpoint.config, checkpoint.source, [ids])
            np.testing.assert_allclose(logits, alone, rtol=1e-4, atol=1e-4)
    # Twice: whoever comes second gets the same.
    for _ in range(2):
        for (a, plain_a), (b, plain_b) in zip(whole.text(), parts.text(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
            assert plain_a is not None and plain_b is not None and not np.allclose(a, plain_a, atol=1e-2)
            np.testing.assert_allclose(plain_a, plain_b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tasks", [True, False], ids=["with tasks", "without"])
def test_a_validation_reads_each_weight_once_and_finds_what_it_always_found(
    bundle: Path, checkpoint: Checkpoint, tiny_r1: Path, tasks: bool
) -> None:
    """The oracle is the old way: the reference on each sequence by itself, the bundle beside it."""
    effort = Effort(**{**vars(EFFORT), "tasks": tasks})
    report = judge_bundle(bundle, checkpoint, effort)
    assert report.parity is not None and report.baseline is not None and report.parity.weights_alone is not None
    read = report.parity.bytes_read
    assert read is not None
    assert 0.9 * _weight_bytes(tiny_r1) < read <= _weight_bytes(tiny_r1)
    assert (report.tasks is not None) == tasks
    config, source = checkpoint.config, checkpoint.source
    subject, session, alone = open_subject(bundle, checkpoint, effort, print), open_positions(bundle), Comparison()
    plain, weights, other = Comparison(), Comparison(), open_positions(bundle, exact=True)
    for ids in subject.sequences:
        (expected,), (rounded,) = (reference_logits(config, s, [ids]) for s in (source, plain_rounding(source)))
        alone.add(expected, session.logits(ids), ids)
        if weights.tokens < 512:
            weights.add(expected, other.logits(ids), ids)
        plain.add(expected, rounded, ids)
    for section, comparison in (
        (report.parity, alone),
        (report.baseline, plain),
        (report.parity.weights_alone, weights),
    ):
        figures = comparison.figures()
        for name in ("mean_kld", "median_kld", "p99_kld", "top1_agreement"):
            assert getattr(section, name) == pytest.approx(getattr(figures, name), rel=2e-3, abs=1e-7), name
    assert report.parity.weights_alone.tokens == weights.tokens < report.parity.tokens
    assert report.parity.perplexity == pytest.approx(alone.figures().perplexity, rel=1e-5)
    prompt = subject.sequences[0][:24]
    (made,) = continuations(bundle, [prompt], 32, on_cpu=True)
    (logits,) = reference_logits(config, source, [prompt + made])
    matched = matching_prefix(logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist(), made)
    assert (report.parity.greedy_match_tokens, report.parity.greedy_tokens) == (matched, len(made))
