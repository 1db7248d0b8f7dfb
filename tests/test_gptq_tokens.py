"""GPTQ from tokens against GPTQ from their second moment: the same problem, solved in T instead of K dimensions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.gptq_oracle import correlated_input, heavy_tailed_weight, output_error, second_moment
from toolkit.quant.blockwise import QuantSpec
from toolkit.quant.gptq import NotPositiveDefiniteError, corrected_target, factorize
from toolkit.quant.gptq_tokens import factorize_tokens, pays

Floats = NDArray[np.float32]
SPECS = [
    QuantSpec(4, 32, False, "gptq"),
    QuantSpec(4, 128, True, "gptq"),
    QuantSpec(4, 32, True, "gptq", signed=True),
    QuantSpec(4, 416, True, "gptq", signed=True),
]


def _inputs(width: int, tokens: int) -> tuple[Floats, Floats]:
    exact = correlated_input(width)[:tokens]
    rng = np.random.default_rng(7)
    arriving = exact * np.float32(0.9) + 0.1 * exact.std() * rng.standard_normal(exact.shape).astype(np.float32)
    return exact, np.asarray(arriving, np.float32)


@pytest.mark.parametrize("tokens", [60, 300])
@pytest.mark.parametrize(
    ("spec", "beside"), [*((spec, ()) for spec in SPECS), (SPECS[0], (16, 256)), (SPECS[1], (16, 256))], ids=str
)
def test_tokens_solve_what_their_moment_solves(spec: QuantSpec, beside: tuple[int, ...], tokens: int) -> None:
    """`beside` are the blocks of other matrices that read the input."""
    width, weight = 416, heavy_tailed_weight(416)
    exact, arriving = _inputs(width, tokens)
    sizes = (width if spec.signed else spec.block_size, *beside)
    by_moment = factorize(second_moment(arriving), sizes, tokens)
    product = weight @ np.asarray(exact.T @ arriving / np.float32(tokens), np.float32)
    expected = by_moment.solved(weight, spec, product)
    specs = [spec, *(replace(spec, block_size=size) for size in beside)]
    found = factorize_tokens(exact, arriving, *specs).solved(weight, spec)
    same = (np.abs(found.restored - expected.restored) <= 1e-3 * np.abs(weight).max()).all(axis=1)
    # A tie that falls the other way moves what follows it in its row.
    assert same.mean() >= 0.75
    wanted = exact @ weight.T
    ours, theirs = (float(np.square(arriving @ s.restored.T - wanted).sum()) for s in (found, expected))
    assert ours == pytest.approx(theirs, rel=0.01)


def test_a_last_block_that_is_not_whole_is_solved_too() -> None:
    weight, spec = heavy_tailed_weight(260), SPECS[0]
    exact, arriving = _inputs(260, 90)
    product = weight @ np.asarray(exact.T @ arriving / np.float32(90), np.float32)
    expected = factorize(second_moment(arriving), 32, 90).solved(weight, spec, product).restored
    found = factorize_tokens(exact, arriving, spec).solved(weight, spec).restored
    assert (np.abs(found - expected) <= 1e-3 * np.abs(weight).max()).mean() > 0.9


def test_the_unrounded_best_is_the_corrected_target() -> None:
    weight, spec = heavy_tailed_weight(416), SPECS[2]
    exact, arriving = _inputs(416, 100)
    product = weight @ np.asarray(exact.T @ arriving / np.float32(100), np.float32)
    expected = corrected_target(weight, product, factorize(second_moment(arriving), 416, 100))
    factor = factorize_tokens(exact, arriving, spec)
    np.testing.assert_allclose(factor._target(weight, weight @ factor.moved.T), expected, atol=2e-3)


def test_few_tokens_of_many_channels_are_better_than_none() -> None:
    """Judged on other tokens of the same kind: the accidents of a few must not cost what they teach."""
    weight, spec, every = heavy_tailed_weight(416), SPECS[0], correlated_input(416)
    few, others = every[:100], every[100:]
    solved = factorize_tokens(few, few, spec).solved(weight, spec).restored
    alone = factorize(np.diag(np.diagonal(second_moment(few))), 32).solved(weight, spec).restored
    ours, without = (output_error(weight, restored, second_moment(others)) for restored in (solved, alone))
    assert ours < 0.8 * without


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_nothing_and_no_numbers_are_refused(value: float) -> None:
    x = np.full((20, 64), value, np.float32)
    with pytest.raises(NotPositiveDefiniteError):
        factorize_tokens(x, x, SPECS[0])


def test_tokens_pay_where_they_are_few() -> None:
    """The 1.5B's down_proj on 2,048 tokens, and not its q, k and v."""
    assert pays(2048, 8960, 1536)
    assert not pays(2048, 1536, 2048)
    assert not pays(16384, 8960, 1536)
