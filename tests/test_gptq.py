"""GPTQ against the textbook's recursion in float64, and against what it is to minimize."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.gptq_oracle import (
    TOKENS,
    correlated_input,
    damped_moment,
    heavy_tailed_weight,
    output_error,
    restored_weight,
    second_moment,
)
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, quantize_blocks
from toolkit.quant.gptq import Factor, NotPositiveDefiniteError, corrected_target, factorize
from toolkit.quant.visits import visits

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
# Whole blocks, a last block of 4, and more columns than one stride of the blocked update.
WIDTHS = (256, 260, 416)
SPECS = [QuantSpec(bits, block, sym, "gptq") for bits, block, sym in product((4, 8), (32, 128), (False, True))]
SPECS += [replace(SPECS[0], short_scales=True)]


def _textbook(weight: Floats, moment: Floats, factor: Factor, spec: QuantSpec) -> Doubles:
    """Optimal brain quantization, a column at a time: the inverse of what is left of H, one elimination a column
    (arXiv 2208.11580, algorithm 3), no factor, no blocks of updates. Each block's scale is looked for when its first
    column is due, by the search that has tests of its own."""
    padded = factor.visits.order.size
    left = np.zeros((len(weight), padded))
    left[:, : weight.shape[1]] = weight
    restored = np.zeros_like(left)
    inverse = np.linalg.inv(damped_moment(moment, factor))
    for position, column in enumerate(factor.visits.order):
        if position % spec.block_size == 0:
            members = factor.visits.order[position : position + spec.block_size]
            found = quantize_blocks(left[:, members].astype(np.float32), spec, _remaining(inverse, members))
            scale = found.scales[:, :1].astype(np.float64)
            half = np.full(scale.shape, float(1 << (spec.bits - 1)))
            zero = half if found.zero_points is None else (found.zero_points & (2**spec.bits - 1)).astype(np.float64)
        x = left[:, [column]]
        steps = np.divide(x, scale, out=np.zeros_like(x), where=scale != 0)
        restored[:, [column]] = (np.clip(np.rint(steps) + zero, 0, 2**spec.bits - 1) - zero) * scale
        own = inverse[column, column]
        left -= (x - restored[:, [column]]) / own * inverse[[column]]
        inverse -= np.outer(inverse[:, column], inverse[column]) / own
    return restored[:, : weight.shape[1]]


def _remaining(inverse: NDArray[np.floating[Any]], members: NDArray[np.int64]) -> Floats:
    """What an error in each of the next columns costs once those behind it have made up for what they can: one over its
    own element of the inverse, when its turn has come. What pads the last block costs nothing, whatever it weighs."""
    left, costs = inverse[np.ix_(members, members)].copy(), np.zeros(members.size, np.float32)
    for k in range(members.size):
        costs[k] = 1 / left[k, k]
        left -= np.outer(left[:, k], left[k]) / left[k, k]
    return costs


@pytest.mark.parametrize("beside", [(), (16, 128)], ids=["alone", "beside other blocks"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_gptq_is_the_textbooks_recursion(width: int, spec: QuantSpec, beside: tuple[int, ...]) -> None:
    weight, moment = heavy_tailed_weight(width), second_moment(correlated_input(width))
    factor = factorize(moment, (spec.block_size, *beside))
    found = restored_weight(factor.solved(weight, spec).blocks, spec, width)
    expected = _textbook(weight, moment, factor, spec)
    # A tie that falls the other way in float32 moves what follows it in its row, and 8 bits have sixteen times as many:
    # .2 to .4 of the rows, by how BLAS orders its sums.
    same = (np.abs(found - expected) <= 1e-4 * np.abs(expected).max()).all(axis=1)
    assert same.mean() >= (0.9 if spec.bits == 4 else 0.1)
    ours, theirs = (output_error(weight, q, moment) for q in (found, expected))
    # A scale that falls to the other side of two bfloat16 is as well half of 1/256 away.
    limit = 0.15 if spec.bits == 8 else 0.01
    assert ours == pytest.approx(theirs, rel=limit)


@pytest.mark.parametrize("width", WIDTHS)
def test_blocks_of_every_size_are_visited_whole(width: int) -> None:
    moments = np.random.default_rng(width).exponential(size=width).astype(np.float32)
    order = visits(moments, {128, 16, 32})
    assert sorted(order.order) == list(range(-(-width // 128) * 128))
    values = order.diagonal[order.order]
    for outer, inner in ((values.size, 128), (128, 32), (32, 16), (16, 1)):
        of_block = order.order.reshape(-1, inner) // inner
        assert (of_block == of_block[:, :1]).all()
        loudest = values.reshape(-1, outer // inner, inner).max(axis=2)
        assert (np.diff(loudest, axis=1) <= 0).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_gptq_errs_less_than_any_rounding(width: int, spec: QuantSpec) -> None:
    weight, moment = heavy_tailed_weight(width), second_moment(correlated_input(width))
    solved = factorize(moment, spec.block_size).solved(weight, spec).blocks
    ours = output_error(weight, restored_weight(solved, spec, width), moment)
    for algorithm in ("rtn", "kquant", "imatrix"):
        rounding = replace(spec, algorithm=algorithm)
        blocks = quantize_blocks(weight, rounding, np.ascontiguousarray(np.diagonal(moment)))
        # Inputs of rank K/4 leave much to make up for; a wrong slice or sign loses to rounding at once.
        assert ours < 0.6 * output_error(weight, restored_weight(blocks, rounding, width), moment)


def test_noise_is_the_plain_error(width: int = 260) -> None:
    spec, weight = QuantSpec(4, 32, algorithm="gptq"), heavy_tailed_weight(width)
    blocks = factorize(second_moment(correlated_input(width)), 32).solved(weight, spec).blocks
    assert blocks.noise == pytest.approx(float(((weight - restored_weight(blocks, spec, width)) ** 2).sum()), rel=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_independent_inputs_are_rounded_as_the_search_rounds(spec: QuantSpec) -> None:
    """Nothing to make up for: H is diagonal, and every error stays where it is."""
    weight, scales = heavy_tailed_weight(256), np.exp(np.random.default_rng(3).standard_normal(256)).astype(np.float32)
    factor = factorize(np.diag(scales), spec.block_size)
    blocks = factor.solved(weight, spec).blocks
    searched = quantize_blocks(weight, replace(spec, algorithm="imatrix"), scales + factor.damped.added)
    found, expected = restored_weight(blocks, spec, 256), restored_weight(searched, spec, 256)
    if spec.bits == 4:
        np.testing.assert_allclose(found, expected, atol=1e-4)
    # Candidates of 8 bits come so close that the order of a sum decides between them.
    ours, theirs = (float((scales * (weight - q) ** 2).sum()) for q in (found, expected))
    assert ours == pytest.approx(theirs, rel=0.01)


def test_columns_are_visited_by_their_moment_and_blocks_stay_together() -> None:
    moment = second_moment(correlated_input(260))
    factor = factorize(moment, 32)
    diagonal = np.diagonal(moment)
    visits = factor.visits.order.reshape(-1, 32)
    assert sorted(factor.visits.order.tolist()) == list(range(288))
    assert all(len(set(block // 32)) == 1 for block in visits)
    largest = [max((diagonal[c] for c in block if c < 260), default=0) for block in visits]
    assert largest == sorted(largest, reverse=True)
    for block in visits:
        inside = [diagonal[c] for c in block if c < 260]
        assert inside == sorted(inside, reverse=True)


@pytest.mark.parametrize("tokens", [np.inf, 260, 1000])
@pytest.mark.parametrize("width", [260, 416])
def test_factor_is_of_the_damped_moment_in_the_order_of_visits(width: int, tokens: float) -> None:
    moment = second_moment(correlated_input(width))
    factor = factorize(moment, 32, tokens)
    upper = factor.upper.astype(np.float64)
    assert np.array_equal(upper, np.triu(upper))
    damped = damped_moment(moment, factor, tokens)[np.ix_(factor.visits.order, factor.visits.order)]
    np.testing.assert_allclose(upper @ upper.T, damped, atol=1e-5 * np.abs(damped).max())


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[-1], QuantSpec(4, 32, True, "gptq", signed=True)], ids=str)
def test_a_solved_matrix_is_restored_as_its_blocks_are(spec: QuantSpec) -> None:
    weight, factor = heavy_tailed_weight(416), factorize(second_moment(correlated_input(416)), 32)
    product = np.asarray(0.9 * weight @ second_moment(correlated_input(416)), np.float32)
    solved = factor.solved(weight, spec, product)
    np.testing.assert_array_equal(solved.restored, restored_weight(solved.blocks, spec, 416))


def test_an_input_that_arrives_changed_is_solved_as_its_target_would_be() -> None:
    moment, weight, spec = second_moment(correlated_input(416)), heavy_tailed_weight(416), SPECS[1]
    factor, product = factorize(moment, spec.block_size), weight @ moment * np.float32(0.9)
    target = corrected_target(weight, product, factor)
    at_once, after = factor.solved(weight, spec, product), factor.solved(target, spec)
    same = (np.abs(at_once.restored - after.restored) <= 1e-4 * np.abs(weight).max()).all(axis=1)
    assert same.mean() > 0.9
    assert at_once.blocks.noise == pytest.approx(float(np.square(at_once.restored - weight).sum()), rel=1e-4)


def test_a_silent_channel_keeps_its_weights() -> None:
    x = correlated_input(256)
    x[:, [3, 40, 41]] = 0
    moment, weight, spec = second_moment(x), heavy_tailed_weight(256), QuantSpec(8, 32, algorithm="gptq")
    found = restored_weight(factorize(moment, 32).solved(weight, spec).blocks, spec, 256)
    step = np.abs(weight).max() / 64
    assert np.abs(found - weight)[:, [3, 40, 41]].max() < step


def test_a_constant_channel_and_twins_are_solved() -> None:
    x = correlated_input(256)
    x[:, 7] = 5.0
    x[:, 9] = x[:, 8]
    moment, weight, spec = second_moment(x), heavy_tailed_weight(256), QuantSpec(4, 32, algorithm="gptq")
    factor = factorize(moment, 32)
    found = restored_weight(factor.solved(weight, spec).blocks, spec, 256)
    assert np.isfinite(found).all()
    searched = quantize_blocks(weight, replace(spec, algorithm="imatrix"), factor.visits.diagonal)
    assert output_error(weight, found, moment) < output_error(weight, restored_weight(searched, spec, 256), moment)


@pytest.mark.parametrize("value", [0.0, 0.37, -2.5])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_of_a_single_value_stay(value: float, symmetric: bool) -> None:
    spec, weight = QuantSpec(4, 32, symmetric, "gptq"), np.full((4, 260), value, np.float32)
    blocks = factorize(second_moment(correlated_input(260)), 32).solved(weight, spec).blocks
    assert np.isfinite(blocks.scales).all()
    np.testing.assert_allclose(restored_weight(blocks, spec, 260), weight, atol=1e-5)


def test_an_indefinite_moment_is_damped_until_it_will_do() -> None:
    """float32 sums can leave a moment with eigenvalues below zero."""
    moment = second_moment(correlated_input(64))
    mean = float(np.diagonal(moment).mean())
    values, vectors = np.linalg.eigh(moment.astype(np.float64))
    values[0] = -0.05 * mean
    indefinite = ((vectors * values) @ vectors.T).astype(np.float32)
    factor = factorize(indefinite, 32)
    assert factor.damped.added[0] == pytest.approx(0.1 * mean, rel=1e-3)
    assert np.isfinite(factor.upper).all()


@pytest.mark.parametrize("case", ["nothing", "nan", "far from it"])
def test_what_no_damping_helps_is_refused(case: str) -> None:
    moment = second_moment(correlated_input(64))
    if case == "nothing":
        moment = np.zeros_like(moment)
    elif case == "nan":
        moment[3, 3] = np.nan
    else:
        moment[5, 9] = moment[9, 5] = 100 * float(np.diagonal(moment).max())
    with pytest.raises(NotPositiveDefiniteError):
        factorize(moment, 32)


@pytest.mark.parametrize("tokens", [np.inf, 100])
def test_the_target_is_the_weight_where_the_input_arrives_as_it_is(tokens: float) -> None:
    moment, weight = second_moment(correlated_input(260)), heavy_tailed_weight(260)
    target = corrected_target(weight, weight @ moment, factorize(moment, 32, tokens))
    np.testing.assert_allclose(target, weight, atol=2e-3)


def test_the_target_is_the_best_for_an_input_that_arrives_changed() -> None:
    exact, weight = correlated_input(256), heavy_tailed_weight(256)
    rng = np.random.default_rng(7)
    arriving = np.asarray(exact * 0.9 + 0.2 * exact.std() * rng.standard_normal(exact.shape), np.float32)
    moment, cross = second_moment(arriving), np.asarray(exact.T @ arriving / np.float32(TOKENS), np.float32)
    factor = factorize(moment, 32)
    target = corrected_target(weight, weight @ cross, factor)
    damping = np.diag(factor.damped.added.astype(np.float64))
    # Least squares, damped towards W: W (C + d) (H + d)^-1.
    wide = weight.astype(np.float64) @ (cross + damping) @ np.linalg.inv(moment + damping)
    np.testing.assert_allclose(target, wide, atol=2e-3)
    wanted = exact @ weight.T
    assert np.square(arriving @ target.T - wanted).sum() < 0.9 * np.square(arriving @ weight.T - wanted).sum()


def test_the_same_bytes_again() -> None:
    spec, weight, factor = (
        QuantSpec(4, 32, algorithm="gptq"),
        heavy_tailed_weight(416),
        factorize(second_moment(correlated_input(416)), 32),
    )
    once, again = (factor.solved(weight, spec).blocks for _ in range(2))
    assert once.packed.tobytes() == again.packed.tobytes()
    assert once.scales.tobytes() == again.scales.tobytes()


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[-1]], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_columns_visited_again_leave_no_step_that_helps(width: int, spec: QuantSpec) -> None:
    """After enough visits no integer alone could move, and no scale, without a larger error of the output: reckoned in
    float64 from H itself, not from its factor."""
    weight, moment = heavy_tailed_weight(width), second_moment(correlated_input(width))
    factor = factorize(moment, spec.block_size)
    once, often = (factor.solved(weight, spec, revisits=times) for times in (0, 40))
    before, found = (restored_weight(solved.blocks, spec, width).astype(np.float64) for solved in (once, often))
    np.testing.assert_array_equal(found.astype(np.float32), often.restored)
    H = damped_moment(moment, factor)[:width, :width]

    def losses(q: Doubles) -> Doubles:
        return np.einsum("nk,kl,nl->n", weight - q, H, weight - q)

    assert (losses(found) <= losses(before) * (1 + 1e-5)).all()
    assert losses(found).sum() < 0.97 * losses(before).sum()
    scales = np.repeat(often.blocks.scales, spec.block_size, axis=1)[:, :width].astype(np.float64)
    slopes = (weight - found) @ H
    helpful = np.abs(slopes / np.diagonal(H)) > 0.51 * np.abs(scales)
    wanted = np.sign(slopes / np.where(scales == 0, 1, scales))
    levels = found / np.where(scales == 0, 1, scales) + _zeros_of(often.blocks, spec, width)
    free = (levels + wanted > -0.5) & (levels + wanted < 2**spec.bits - 0.5) & (scales != 0)
    assert (helpful & free).mean() < 1e-3


def _zeros_of(blocks: QuantizedBlocks, spec: QuantSpec, width: int) -> Doubles:
    """The zero point of each weight [N, K]."""
    if blocks.zero_points is None:
        return np.full((len(blocks.scales), width), float(1 << (spec.bits - 1)))
    packed, J = blocks.zero_points, blocks.scales.shape[1]
    apart = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1) if spec.bits == 4 else packed
    return np.repeat(apart[:, :J], spec.block_size, axis=1)[:, :width].astype(np.float64)
