"""What calibration computes with: importance, folds, rounded activations, budgets and divergences, each against an
oracle of its own."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from tests.random_models import CASES, make_checkpoint
from toolkit.calibrate.ladder import SharedFormat, spend_budget
from toolkit.calibrate.statistics import InputStatistics, Products
from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.folded import FoldedTensors
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.errors import NonFiniteError
from toolkit.names import weight as weight_name
from toolkit.quant.activations import InputSample, Rounding, rounded_activations
from toolkit.quant.awq import Reader, choose_scales, output_loss
from toolkit.quant.blockwise import QuantSpec, dequantize_blocks, quantize_blocks
from toolkit.quant.formats import other_formats
from toolkit.quant.mixed import Choice, spend
from toolkit.reference import decoder
from toolkit.reference.decoder import reference_hidden, reference_logits
from toolkit.reference.divergence import Diverging, mean_divergences

Floats = NDArray[np.float32]


def _product(
    x: Floats, weight: Floats, spec: QuantSpec, accuracy_level: int, importance: Floats | None = None
) -> Floats:
    """ORT's own MatMulNBits."""
    blocks = quantize_blocks(weight, spec, importance)
    arrays: dict[str, NDArray[Any]] = {"b": blocks.packed, "s": blocks.scales}
    if blocks.zero_points is not None:
        arrays["z"] = blocks.zero_points
    node = helper.make_node(
        "MatMulNBits",
        ["x", *arrays],
        ["y"],
        domain="com.microsoft",
        K=weight.shape[1],
        N=weight.shape[0],
        bits=spec.bits,
        block_size=spec.block_size,
        accuracy_level=accuracy_level,
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", T.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", T.FLOAT, [None, None])],
        [onnx.numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return np.asarray(ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0])


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 5])
def test_activations_are_rounded_as_ort_rounds_them(block_size: int, rows: int) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((rows, 384)) * np.exp(2 * rng.standard_normal(384))).astype(np.float32)
    weight, spec = rng.standard_normal((32, 384)).astype(np.float32), QuantSpec(4, block_size)
    restored = dequantize_blocks(quantize_blocks(weight, spec), spec, 384)
    theirs = _product(x, weight, spec, accuracy_level=4)
    ours = rounded_activations(x, block_size) @ restored.T
    scale = np.abs(ours).max()
    assert np.abs(ours - theirs).max() <= 1e-5 * scale
    # The rounding is what was predicted: without it, or by other blocks, the product is another one.
    assert np.abs(x @ restored.T - theirs).max() > 1e-3 * scale
    assert np.abs(rounded_activations(x, block_size // 2) @ restored.T - theirs).max() > 1e-4 * scale


def test_rounded_activations_end_in_a_shorter_block() -> None:
    x = np.random.default_rng(0).standard_normal((3, 70)).astype(np.float32)
    x[1] = 0
    found = rounded_activations(x, 32)
    assert found.shape == x.shape
    np.testing.assert_array_equal(found[1], 0)
    np.testing.assert_array_equal(found[:, 64:], rounded_activations(np.ascontiguousarray(x[:, 64:]), 32))


@pytest.mark.parametrize(
    "spec", [QuantSpec(b, k, s, "imatrix") for b in (4, 8) for k in (32, 128) for s in (False, True)]
)
def test_importance_buys_error_where_it_counts(spec: QuantSpec) -> None:
    rng = np.random.default_rng(4)
    weight = rng.standard_t(4, (64, 260)).astype(np.float32)
    importance = np.exp(2 * rng.standard_normal(260)).astype(np.float32)

    def weighted(algorithm: str, given: Floats | None) -> float:
        used = replace(spec, algorithm=algorithm)
        miss = dequantize_blocks(quantize_blocks(weight, used, given), used, 260).astype(np.float64) - weight
        return float((importance * miss**2).sum())

    found = weighted("imatrix", importance)
    assert found < 0.9 * weighted("rtn", None)
    assert found < 0.97 * weighted("kquant", None)
    # Importance of other columns is worth nothing.
    assert found < 0.97 * weighted("imatrix", np.ascontiguousarray(importance[::-1]))


def test_algorithms_without_data_look_at_none() -> None:
    weight = np.random.default_rng(4).standard_normal((8, 64)).astype(np.float32)
    importance = np.linspace(0.1, 9, 64).astype(np.float32)
    for algorithm in ("rtn", "kquant"):
        spec = QuantSpec(algorithm=algorithm)
        with_data, without = quantize_blocks(weight, spec, importance), quantize_blocks(weight, spec)
        assert with_data.packed.tobytes() == without.packed.tobytes()


def test_a_silent_column_keeps_its_weights() -> None:
    """What the text never touched is not given up: other text may."""
    weight = np.random.default_rng(4).standard_normal((8, 32)).astype(np.float32)
    importance = np.ones(32, np.float32)
    importance[::4] = 0
    spec = QuantSpec(4, 32, algorithm="imatrix")
    restored = dequantize_blocks(quantize_blocks(weight, spec, importance), spec, 32)
    assert np.abs(restored - weight).max() < 0.5


def _sample(x: Floats) -> InputSample:
    """A text of these tokens alone."""
    return InputSample(x, (x**2).mean(axis=0), np.minimum(x.min(axis=0), 0), np.maximum(x.max(axis=0), 0))


@pytest.mark.parametrize("rounding", [Rounding.NONE, Rounding.INT8])
def test_scales_save_salient_channels(rounding: Rounding) -> None:
    rng = np.random.default_rng(5)
    channels = np.ones(256, np.float32)
    channels[[3, 77, 200]] = 60
    sample = (rng.standard_normal((256, 256)) * channels).astype(np.float32)
    moments = (sample**2).mean(axis=0)
    spec = QuantSpec(4, 64, algorithm="imatrix")
    readers = [Reader(rng.standard_normal((n, 256)).astype(np.float32), spec) for n in (64, 96)]
    found = choose_scales(readers, _sample(sample), np.arange(256), rounding)
    assert found.scales is not None
    assert found.loss < 0.35 * found.plain_loss
    # What is claimed, computed by ORT's kernel: rounded weights of scaled columns, on the divided input.
    claimed = energy = 0.0
    for reader in readers:
        wanted = sample @ reader.weight.T
        scaled, importance = reader.weight * found.scales, moments / found.scales**2
        y = _product(sample / found.scales, scaled, spec, 4 if rounding is Rounding.INT8 else 1, importance)
        claimed += float(((y - wanted) ** 2).sum())
        energy += float((wanted**2).sum())
    assert claimed / energy == pytest.approx(found.loss, rel=0.002)
    plain = [output_loss(reader, _sample(sample), rounding) for reader in readers]
    assert min(plain) <= found.plain_loss <= max(plain)


def test_solved_matrices_are_folded_for_much_alone() -> None:
    rng = np.random.default_rng(5)
    reader = Reader(rng.standard_normal((96, 256)).astype(np.float32), QuantSpec(4, 64, algorithm="gptq"))
    shares = {}
    for size in (3, 60):
        channels = np.ones(256, np.float32)
        channels[::16] = size
        sample = _sample((rng.standard_normal((256, 256)) * channels).astype(np.float32))
        searched, solved = (choose_scales([reader], sample, np.arange(256), Rounding.INT8, s) for s in (False, True))
        assert searched.scales is not None
        shares[size] = searched.loss / searched.plain_loss
        assert (solved.scales is None) == (size == 3)
        if solved.scales is not None:
            np.testing.assert_array_equal(solved.scales, searched.scales)
    assert shares[60] < 0.5 < shares[3] < 1


def test_channels_that_share_a_row_share_a_scale() -> None:
    rng = np.random.default_rng(5)
    sample = rng.standard_normal((64, 64)).astype(np.float32)
    sample[:, 5] *= 50
    shared = np.arange(64) % 16
    readers = [Reader(rng.standard_normal((32, 64)).astype(np.float32), QuantSpec(4, 32))]
    for rounding in Rounding:
        found = choose_scales(readers, _sample(sample), shared, rounding)
        assert found.scales is not None
        for row in range(16):
            assert len(set(found.scales[shared == row].tolist())) == 1


def _through_uint16(x: Floats, low: float, high: float) -> Floats:
    """ORT's own QuantizeLinear and DequantizeLinear, in the range with its headroom."""
    step = (high - low) * 1.25 / 65535
    nearest = np.float16(step)
    scale = np.float32(nearest if float(nearest) >= step else np.nextafter(nearest, np.float16(np.inf)))
    zero = np.uint16(round(-low * 1.25 / float(scale)))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["levels"]),
        helper.make_node("DequantizeLinear", ["levels", "scale", "zero"], ["y"]),
    ]
    constants = [numpy_helper.from_array(np.array(scale), "scale"), numpy_helper.from_array(np.array(zero), "zero")]
    ends = [helper.make_tensor_value_info(name, T.FLOAT, ["T", "K"]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "uint16", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y, np.float32)


def test_scales_are_chosen_for_what_one_range_does_to_other_channels() -> None:
    """One token in 256 reaches 30,000 in one channel, as massive activations do."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal((256, 2048)).astype(np.float32)
    x[7, 200] = 30000
    reader = Reader(rng.standard_normal((32, 2048)).astype(np.float32), QuantSpec(4, 64, algorithm="imatrix"))
    sample, ordinary = _sample(x), np.arange(256) != 7

    def error(scales: Floats | None) -> float:
        """Of the output of tokens that are not massive, uint16 alone: the weights are exact."""
        assert scales is not None
        divided = sample.divided(scales)
        seen = _through_uint16(divided.tokens, divided.values().low, divided.values().high)
        np.testing.assert_array_equal(seen, divided.rounded(Rounding.UINT16, 64))
        y, wanted = seen @ (reader.weight * scales).T, x @ reader.weight.T
        return float(np.sqrt(((y - wanted)[ordinary] ** 2).mean() / (wanted[ordinary] ** 2).mean()))

    roundings = (Rounding.NONE, Rounding.UINT16)
    blind, seeing = (choose_scales([reader], sample, np.arange(2048), rounding).scales for rounding in roundings)
    assert error(np.ones(2048, np.float32)) > 0.15 and error(seeing) < error(blind) / 2


@pytest.mark.parametrize(
    "case", ["qwen2", "qwen2-tied", "llama-bias", "qwen3", "llama-narrow-heads", "deepseek-v2", "deepseek-v3"]
)
def test_folding_changes_no_output(case: str, tmp_path: Path) -> None:
    family, extra = CASES[case]
    make_checkpoint(family, extra, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    config, rng = checkpoint.config, np.random.default_rng(6)
    scales = {}
    for given in decoder_of(config).inputs:
        if given.writers:
            factors = np.exp(rng.standard_normal(given.width // given.shared)).astype(np.float32)
            heads = factors.reshape(-1, 1, given.head_dim).repeat(given.shared, axis=1)
            scales[given.name] = heads.reshape(-1)
    # Of latents the norm's output, one or two latents, and what down_proj reads; a norm before experts is theirs too.
    expected = 4 * config.num_hidden_layers
    if latent := config.structure.latent:
        expected += config.num_hidden_layers * (latent.q_lora_rank is not None) - 2
    assert len(scales) == expected + (not config.tie_word_embeddings)
    folded = FoldedTensors(checkpoint.source, decoder_of(config).inputs, scales)
    ids = rng.integers(3, 96, 40).tolist()
    (plain,), (other,) = (reference_logits(config, source, [ids]) for source in (checkpoint.source, folded))
    assert np.abs(plain - other).max() <= 1e-4 * np.abs(plain).max()
    # By rows and by streaming as by whole tensors: both are how the export reads.
    for rows in folded.scan(1 << 20):
        whole = folded.read(rows.name)
        count = whole.shape[0]
        np.testing.assert_array_equal(folded.decode(rows, rows.start, rows.stop), whole[rows.start : rows.stop])
        np.testing.assert_array_equal(folded.read_rows(rows.name, count // 2, count), whole[count // 2 :])
    changed = [n for n in folded.names() if not np.array_equal(folded.read(n), checkpoint.source.read(n))]
    assert set(changed) >= {
        weight_name(r) for given in decoder_of(config).inputs if given.writers for r in given.readers
    }


def test_inputs_of_a_layer_are_what_its_linears_read(tiny_r1: Path) -> None:
    """Every linear of the checkpoint reads one input, and every scale has somewhere to go."""
    checkpoint = open_checkpoint(tiny_r1)
    readers = [weight_name(r) for given in decoder_of(checkpoint.config).inputs for r in given.readers]
    linears = [n for n in checkpoint.source.names() if checkpoint.source.read(n).ndim == 2 and "embed" not in n]
    assert sorted(readers) == sorted(linears)
    for given in decoder_of(checkpoint.config).layers[0].inputs:
        for reader in given.readers:
            assert checkpoint.source.read(weight_name(reader)).shape[1] == given.width


def _random_ways(rng: np.random.Generator, most: int) -> list[Choice]:
    count = int(rng.integers(1, most))
    return [Choice(QuantSpec(block_size=16 << k), int(rng.integers(1, 40)), float(rng.random())) for k in range(count)]


@pytest.mark.parametrize("seed", range(40))
def test_a_budget_is_kept_and_spent_well(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ways = {f"m{k}": _random_ways(rng, 5) for k in range(5)}
    least = sum(min(way.nbytes for way in choices) for choices in ways.values())
    budget = least + int(rng.integers(0, 80))
    chosen = spend(ways, budget)
    assert set(chosen) == set(ways)
    assert sum(way.nbytes for way in chosen.values()) <= budget
    loss = sum(way.loss for way in chosen.values())
    affordable = [
        sum(way.loss for way in combination)
        for combination in itertools.product(*ways.values())
        if sum(way.nbytes for way in combination) <= budget
    ]
    # Greedy on hulls is optimal but for the last step, which costs at most what one step buys.
    largest_step = max(max(w.loss for w in c) - min(w.loss for w in c) for c in ways.values())
    assert min(affordable) <= loss <= min(affordable) + largest_step


@pytest.mark.parametrize("seed", range(10))
def test_a_budget_that_one_price_of_a_byte_explains_is_spent_best(seed: int) -> None:
    """Lagrange: what is cheapest for each matrix at one price is best of all at its size (Everett 1963)."""
    rng = np.random.default_rng(100 + seed)
    ways = {f"m{k}": _random_ways(rng, 6) for k in range(12)}
    sizes = set()
    for price in np.geomspace(1e-4, 1, 60):
        cheapest = [min(choices, key=lambda way: way.loss + price * way.nbytes) for choices in ways.values()]
        budget = sum(way.nbytes for way in cheapest)
        sizes.add(budget)
        assert sum(w.loss for w in spend(ways, budget).values()) == pytest.approx(sum(w.loss for w in cheapest))
    assert len(sizes) > 3


def test_bits_go_to_what_suffers_most() -> None:
    spec = QuantSpec(4, 64, algorithm="imatrix")
    shape = ((256, 256),)
    losses = {way: (0.0001 if way.bits == 8 else 0.01 * way.block_size / 64) for way in other_formats(spec, 256)}
    units = [SharedFormat((name,), shape, spec, divergence, losses) for name, divergence in (("a", 0.1), ("b", 0.001))]
    chosen = spend_budget(units, 6.6, lambda _: "float32")
    assert (chosen["a"].bits, chosen["b"].bits) == (8, 4)
    assert all(way.bits == 8 for way in spend_budget(units, 9.0, lambda _: "float32").values())
    assert {way.block_size for way in spend_budget(units, 1.0, lambda _: "float32").values()} == {128}


def test_what_is_solved_gets_eight_bits_last() -> None:
    """Eight bits are not solved: they do not make up for what layers before have changed."""
    spec = QuantSpec(4, 64, algorithm="gptq")
    losses = {way: (0.0001 if way.bits == 8 else 0.01 * way.block_size / 64) for way in other_formats(spec, 256)}
    loud, calm, head = (
        SharedFormat((name,), ((rows, 256),), spec, divergence, losses)
        for name, rows, divergence in (
            ("model.layers.0.a", 256, 0.1),
            ("model.layers.1.a", 2048, 0.001),
            ("lm_head.weight", 256, 0.05),
        )
    )

    def bought(bits_per_weight: float) -> list[tuple[int, int]]:
        chosen = spend_budget([loud, calm, head], bits_per_weight, lambda _: "float32")
        return [(chosen[one.tensors[0]].bits, chosen[one.tensors[0]].block_size) for one in (loud, calm, head)]

    narrowest = 4 + 32 / 32 + 4 / 32
    assert bought(narrowest - 0.01) == [(4, 32), (4, 64), (8, 128)]
    assert bought(narrowest + 0.9) == [(8, 128), (4, 32), (8, 128)]


def test_statistics_are_those_of_the_whole_text() -> None:
    rng = np.random.default_rng(8)
    sequences = [rng.standard_normal((n, 24)).astype(np.float32) for n in (1, 130, 512, 7, 350)]
    whole = np.concatenate(sequences)
    statistics, products = InputStatistics("x", 24, len(whole)), Products(24)
    for x in sequences:
        assert statistics.add(x) is x
        products.add(x, 2 * x + 1)
    sample = statistics.sample()
    np.testing.assert_allclose(sample.moments, (whole.astype(np.float64) ** 2).mean(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(sample.low, whole.min(axis=0))
    np.testing.assert_array_equal(sample.high, whole.max(axis=0))
    assert 200 <= len(sample.tokens) <= len(whole)
    rows = {row.tobytes() for row in whole}
    assert all(row.tobytes() in rows for row in sample.tokens)
    moment, cross = products.result()
    arriving = (2 * whole + 1).astype(np.float64)
    np.testing.assert_allclose(moment, arriving.T @ arriving / len(whole), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(cross, whole.T.astype(np.float64) @ arriving / len(whole), rtol=1e-4, atol=1e-4)


def test_products_of_few_rows_are_those_of_the_whole_product() -> None:
    rng = np.random.default_rng(8)
    weight = rng.standard_normal((5, 24)).astype(np.float32)
    whole, few = Products(24), Products(24, weight)
    for n in (1, 3000, 512):
        x = rng.standard_normal((n, 24)).astype(np.float32)
        arriving = (x + 0.3 * rng.standard_normal((n, 24))).astype(np.float32)
        whole.add(x, arriving)
        few.add(x, arriving)
    (moment, cross), (same_moment, product) = whole.result(), few.result()
    np.testing.assert_array_equal(moment, same_moment)
    np.testing.assert_allclose(product, weight @ cross, atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_activation_that_is_no_number_names_its_input(value: float) -> None:
    x = np.ones((4, 24), np.float32)
    x[2, 5] = value
    with pytest.raises(NonFiniteError, match=r"mlp\.down_proj is NaN or infinite in 1 of 24 channels"):
        InputStatistics("model.layers.1.mlp.down_proj", 24, 4).add(x)


@pytest.mark.parametrize("case", ["qwen2", "qwen2-tied"])
def test_divergences_are_those_of_whole_distributions(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "HEAD_ROWS", 20)
    family, extra = CASES[case]
    make_checkpoint(family, extra, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    rng = np.random.default_rng(9)
    ids = rng.integers(3, 96, 40).tolist()
    (exact,) = reference_hidden(checkpoint.config, checkpoint.source, [ids])
    other = (exact + 0.1 * rng.standard_normal(exact.shape)).astype(np.float32)
    found = mean_divergences(
        checkpoint.config, checkpoint.source, exact, {"same": Diverging(exact), "other": Diverging(other)}
    )
    name = weight_name("model.embed_tokens" if checkpoint.config.tie_word_embeddings else "lm_head")
    head = checkpoint.source.read(name).astype(np.float64)

    def log_shares(hidden: Floats) -> NDArray[np.float64]:
        logits = hidden.astype(np.float64) @ head.T
        return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))

    p, q = log_shares(exact), log_shares(other)
    expected = float((np.exp(p) * (p - q)).sum(axis=1).mean())
    assert found["other"] == pytest.approx(expected, rel=1e-3)
    assert abs(found["same"]) < 1e-6 < expected


def test_heads_that_differ_diverge(tiny_r1: Path) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    (exact,) = reference_hidden(checkpoint.config, checkpoint.source, [list(range(40, 80))])

    found = mean_divergences(
        checkpoint.config, checkpoint.source, exact, {"": Diverging(exact, lambda rows: 1.5 * rows)}
    )
    assert found[""] > 1e-3
