"""Models with experts: graphs beside their own dequantized weights, what a calibration text shows of each expert, what
is refused before anything is packed, and memory that does not grow with the number of experts."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from tests.graphs import export_bundle, recipe_for, write_graphs
from tests.random_models import CASES, LATENT, greedy_by_transformers, make_checkpoint
from toolkit.bundle.operators import check_experts
from toolkit.calibrate.experts import FEWEST_ROUTED
from toolkit.calibrate.survey import Wish, survey
from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import parse_config, read_config
from toolkit.checkpoint.family import Experts
from toolkit.checkpoint.linears import LinearInput
from toolkit.checkpoint.opened import open_checkpoint, synthetic_checkpoint
from toolkit.checkpoint.remembered import Remembered
from toolkit.checkpoint.rotated import rotate
from toolkit.checkpoint.synthetic import SyntheticWeights
from toolkit.checkpoint.weights import expected_tensors, open_weights
from toolkit.errors import CheckpointError, RecipeError, UnsupportedError
from toolkit.evaluate.positions import open_positions
from toolkit.graph.layout import Layout, plan_layout
from toolkit.partition.data_files import Destination
from toolkit.partition.pack import pack_weights
from toolkit.partition.stored import StoredTensors
from toolkit.pipeline.plan import plan_export
from toolkit.quant.activations import Rounding
from toolkit.quant.blockwise import QuantSpec, dequantize_blocks, quantize_blocks
from toolkit.quant.formats import planned_specs
from toolkit.recipe import QuantRule, Recipe, load_recipe, sized
from toolkit.reference.decoder import Layer, embed, read_layer, reference_hidden, reference_logits
from toolkit.reference.greedy import greedy_continuations
from toolkit.reference.routing import routed_by_groups
from toolkit.target import CPU_FORM, TARGETS

IDS = [int(i) for i in np.random.default_rng(3).integers(3, 96, 40)]
GATE = "model.layers.0.mlp.experts.5.gate_proj.weight"


def _config_json(tmp_path: Path, **changes: Any) -> Path:
    """A folder with the config of the case, changed; returns it."""
    make_checkpoint(*CASES["qwen3-moe"], tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("case", ["qwen3-moe", "qwen3-moe-shares-of-all", "gpt-oss", "deepseek-v3", "deepseek-v2"])
@pytest.mark.parametrize("rule", [QuantRule("*"), QuantRule("*", symmetric=True), QuantRule("*", block_size=16)])
def test_graphs_compute_the_dequantized_weights_of_their_experts(case: str, rule: QuantRule, tmp_path: Path) -> None:
    make_checkpoint(*CASES[case], tmp_path)
    config = read_config(tmp_path)
    layout = write_graphs(tmp_path, tmp_path / "bundle", recipe=recipe_for("cpu", (rule,)))
    stored = StoredTensors(layout, tmp_path / "bundle")
    (expected,) = reference_logits(config, stored, [IDS])
    bundle = open_positions(tmp_path / "bundle", exact=True)
    for prompt in (None, 1, 9):
        assert np.abs(bundle.logits(IDS, prompt) - expected).max() <= 1e-4
    (exact,) = reference_logits(config, open_checkpoint(tmp_path).source, [IDS])
    assert np.abs(expected - exact).max() > 1e-2


def test_rows_of_experts_lie_by_turns_and_are_read_back_as_they_were_rounded(tmp_path: Path) -> None:
    make_checkpoint(*CASES["qwen3-moe"], tmp_path)
    config = read_config(tmp_path)
    source = open_weights(tmp_path, config)
    layout = write_graphs(tmp_path, tmp_path / "bundle", recipe=recipe_for("cpu"))
    stored = StoredTensors(layout, tmp_path / "bundle")
    spec = QuantSpec(4, 32, False, "kquant", short_scales=True)
    for expert in decoder_of(config).moes[0].experts:
        for linear in (expert.gate_proj, expert.up_proj, expert.down_proj):
            weight = source.read(linear.weight)
            rounded = dequantize_blocks(quantize_blocks(weight, spec), spec, weight.shape[1])
            assert np.array_equal(stored.read(linear.weight), rounded)
            assert np.array_equal(stored.read_rows(linear.weight, 3, 9), rounded[3:9])
    unit = layout.units["model.layers.0.mlp.experts.gate_up_proj.weight"]
    both = _rows(tmp_path / "bundle", layout, unit.name)
    gate, up = (quantize_blocks(source.read(GATE.replace("gate", kind)), spec).packed for kind in ("gate", "up"))
    assert np.array_equal(both[5 * 64 : 6 * 64 : 2], gate) and np.array_equal(both[5 * 64 + 1 : 6 * 64 : 2], up)


def _rows(folder: Path, layout: Layout, name: str) -> NDArray[np.uint8]:
    slot = layout.units[name].slots[0]
    raw = (folder / slot.file).read_bytes()[slot.offset : slot.offset + slot.nbytes]
    return np.frombuffer(raw, np.uint8).reshape(slot.shape)


@pytest.mark.parametrize("case", ["qwen3-moe", "gpt-oss", "deepseek-v3"])
def test_the_reference_continues_as_transformers_does(case: str, tmp_path: Path) -> None:
    model = make_checkpoint(*CASES[case], tmp_path)
    prompts, source = [IDS[:9], IDS[5:20]], open_checkpoint(tmp_path).source
    found = greedy_continuations(read_config(tmp_path), source, prompts, 20, set())
    for prompt, made in zip(prompts, found, strict=True):
        assert made == greedy_by_transformers(model, prompt, len(made))


@pytest.mark.parametrize("case", ["qwen3-moe", "gpt-oss"])
def test_rotation_changes_no_output_of_a_model_with_experts(case: str, tmp_path: Path) -> None:
    make_checkpoint(*CASES[case], tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    (exact,) = reference_logits(checkpoint.config, checkpoint.source, [IDS])
    (turned,) = reference_logits(checkpoint.config, rotate(checkpoint).source, [IDS])
    assert np.abs(turned - exact).max() <= 1e-4 * np.abs(exact).max()


def test_experts_of_one_tensor_are_read_by_rows_as_transformers_multiplies_them(tmp_path: Path) -> None:
    model = make_checkpoint(*CASES["gpt-oss"], tmp_path)
    source = open_checkpoint(tmp_path).source
    stored = dict(model.named_parameters())
    prefix = "model.layers.1.mlp.experts."
    gate_up = stored[f"{prefix}gate_up_proj"].detach().numpy()[5]
    biases = stored[f"{prefix}gate_up_proj_bias"].detach().numpy()[5]
    assert np.array_equal(source.read(f"{prefix}5.up_proj.weight"), gate_up[:, 1::2].T)
    assert np.array_equal(source.read_rows(f"{prefix}5.gate_proj.weight", 7, 20), gate_up[:, 14:40:2].T)
    assert np.array_equal(source.read(f"{prefix}5.up_proj.bias"), biases[1::2])
    scanned = {rows.name: source.decode(rows, rows.start, rows.stop) for rows in source.scan(1 << 20)}
    assert sorted(scanned) == sorted(source.names()) == sorted(expected_tensors(read_config(tmp_path)))
    assert all(np.array_equal(values, source.read(name)) for name, values in scanned.items())


def _read_by_linears(model: PreTrainedModel) -> dict[str, NDArray[np.float32]]:
    """What transformers' linears of the layers read of `IDS`, [tokens, width] by the module's name."""
    seen: dict[str, NDArray[np.float32]] = {}

    def keep(name: str) -> Callable[..., None]:
        def kept(_: Any, given: tuple[torch.Tensor]) -> None:
            seen[name] = given[0].numpy().reshape(-1, given[0].shape[-1])

        return kept

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        model(torch.tensor([IDS]))
    return seen


def test_a_survey_counts_and_weighs_the_tokens_that_transformers_sends_to_each_expert(tmp_path: Path) -> None:
    seen = _read_by_linears(make_checkpoint(*CASES["qwen3-moe"], tmp_path))
    config = read_config(tmp_path)
    wish = Wish(planned_specs(config, recipe_for("cpu"), CPU_FORM), Rounding.INT8, Rounding.INT8, True, False)
    found = survey(config, open_weights(tmp_path, config), [IDS], wish, tmp_path / "survey")
    inputs = [given for moe in decoder_of(config).moes for given in moe.inputs]
    assert len(inputs) == 32 and {given.name in seen for given in inputs} == {True}
    for given in inputs:
        facts, values = found.inputs[given.name], seen[given.name]
        assert facts.tokens == len(values)
        enough = len(values) >= FEWEST_ROUTED
        moments = np.square(values).mean(axis=0) if enough else np.zeros(given.width)
        assert np.allclose(facts.importance, moments, rtol=1e-4, atol=1e-6)
    # As many come to all experts of a layer as there are tokens, each to three.
    first = [found.inputs[f"model.layers.0.mlp.experts.{k}.gate_proj"].tokens or 0 for k in range(8)]
    assert sum(first) == 3 * len(IDS)
    assert min(first) < FEWEST_ROUTED


def test_a_survey_sees_what_transformers_makes_of_latents_and_gives_to_shared_experts(tmp_path: Path) -> None:
    seen = _read_by_linears(make_checkpoint(*CASES["deepseek-v3"], tmp_path))
    config = read_config(tmp_path)
    wish = Wish(planned_specs(config, recipe_for("cpu"), CPU_FORM), Rounding.INT8, Rounding.INT8, False, False)
    found = survey(config, open_weights(tmp_path, config), [IDS], wish, tmp_path / "survey")
    inputs = [given for layer in decoder_of(config).layers for given in layer.inputs if not given.routed]
    assert len(inputs) == 3 * (4 + 2)
    for given in inputs:
        for reader in given.readers:
            moments = np.square(seen[reader]).mean(axis=0)
            assert np.allclose(found.inputs[given.name].importance, moments, rtol=1e-3, atol=1e-6), reader


def test_latents_are_solved_experts_are_searched_and_the_rest_is_whole(tmp_path: Path) -> None:
    make_checkpoint(*CASES["deepseek-v3"], tmp_path / "checkpoint")
    checkpoint = synthetic_checkpoint(tmp_path / "checkpoint")
    bundle = export_bundle(_calibrated(), checkpoint, tmp_path / "bundle")
    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    algorithms = {row["name"]: row["algorithm"] for row in report["quantization"]["tensors"]}
    prefix = "model.layers.1."
    solved = [f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "o_proj")]
    solved += [f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")]
    assert {algorithms[f"{prefix}{name}.weight"] for name in solved} == {"gptq"}
    searched = ["self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "mlp.experts.3.up_proj"]  # of 8 bits, and routed
    assert {algorithms[f"{prefix}{name}.weight"] for name in searched} == {"imatrix"}
    assert report["quantization"]["calibration"]["experts"]["experts"] == 16


def _calibrated(**changes: Any) -> Recipe:
    recipe = replace(load_recipe("qwen3-30b-a3b-cpu"), name="small", context_length=64)
    rules = sized(recipe.quantize, parameters=0)
    return replace(recipe, quantize=rules, quality="balanced", calibration_tokens=512, **changes)


def test_a_calibrated_export_searches_experts_that_saw_too_few_tokens_and_says_so(tmp_path: Path) -> None:
    folder = _config_json(tmp_path, num_experts=32, num_experts_per_tok=1)
    bundle = export_bundle(_calibrated(), synthetic_checkpoint(folder), tmp_path / "bundle")
    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    told = report["quantization"]["calibration"]["experts"]
    assert told["experts"] == 64 and told["needed"] == FEWEST_ROUTED
    assert told["fewest"] <= told["median"] <= told["most"] and 0 < told["searched"] < 64
    rows = {row["name"]: row for row in report["quantization"]["tensors"]}
    assert (
        rows[GATE]["algorithm"] == "imatrix" and rows["model.layers.0.self_attn.q_proj.weight"]["algorithm"] == "gptq"
    )
    assert "experts, " in (bundle / "report.html").read_text(encoding="utf-8")


def test_best_solves_experts_by_the_tokens_that_come_to_them(tmp_path: Path) -> None:
    """An expert's output on its own tokens errs less than where its scales are searched by the same tokens."""
    make_checkpoint(*CASES["deepseek-v3"], tmp_path / "checkpoint")
    checkpoint = synthetic_checkpoint(tmp_path / "checkpoint")
    config, source = checkpoint.config, checkpoint.source
    errors = {}
    for quality in ("balanced", "best"):
        recipe = replace(_calibrated(), quality=quality)
        bundle = export_bundle(recipe, checkpoint, tmp_path / quality)
        report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
        rows = {row["name"]: row["algorithm"] for row in report["quantization"]["tensors"]}
        solved = "gptq" if quality == "best" else "imatrix"
        assert {rows[name] for name in rows if ".experts." in name} == {solved}
        stored = StoredTensors(plan_layout(config, TARGETS["cpu"], recipe), bundle)
        sequences = [np.random.default_rng(9).integers(0, 96, 512).tolist()]  # others than those of the text
        hidden = [embed(source, ids) for ids in sequences]
        layers = [read_layer(config, source, k) for k in range(2)]
        rounded = read_layer(config, stored, 1)
        found: list[float] = []

        def look(given: LinearInput, values: NDArray[np.float32], rounded: Layer = rounded) -> NDArray[np.float32]:
            for linear in given.linears if given.routed else ():
                exact = values @ source.read(linear.weight).T
                found.append(float(np.square(rounded.product(linear, values) - exact).sum()))  # noqa: B023
            return values

        x = layers[0](hidden[0])
        for half in layers[1].anatomy.sublayers:
            x = layers[1].through(half, x, look=look)
        errors[quality] = sum(found)
    assert errors["best"] < 0.95 * errors["balanced"], errors


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "more than there are": ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, expected at most the 8 of num_exp"),
    "no layer": ({"mlp_only_layers": [0, 7]}, r"mlp_only_layers is \[0, 7\], expected indices of the 3 layers"),
    "no list": ({"mlp_only_layers": 1}, "mlp_only_layers is 1, expected indices of the 3 layers"),
    "no step": ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0, expected a positive whole number"),
    "no flag": ({"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes', expected true or false"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fields_that_route_nowhere_are_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    folder = _config_json(tmp_path)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    with pytest.raises(CheckpointError, match=message):
        parse_config(raw, Path("config.json"))


def test_experts_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks 6 tensors, the first is model.layers.0.mlp.experts.8"):
        open_checkpoint(_config_json(tmp_path, num_experts=9, decoder_sparse_step=1))


@pytest.mark.parametrize("target", [name for name, row in TARGETS.items() if row.form != CPU_FORM])
def test_a_target_without_the_operator_refuses_in_the_plan(target: str, tmp_path: Path) -> None:
    folder = _config_json(tmp_path)
    recipe = replace(recipe_for(target), context_length=64)
    with pytest.raises(UnsupportedError, match=r"com.microsoft:QMoE is not among its operators.*for target cpu"):
        plan_export(recipe, synthetic_checkpoint(folder), tmp_path / "bundle", "int4")
    with pytest.raises(UnsupportedError):
        check_experts(TARGETS[target], read_config(folder))


def test_what_experts_cannot_be_stored_as_is_refused_in_the_plan(tmp_path: Path) -> None:
    checkpoint = synthetic_checkpoint(_config_json(tmp_path, moe_intermediate_size=48))
    with pytest.raises(RecipeError, match=r"in blocks of 32: experts 48 wide have whole blocks alone; give \*.experts"):
        plan_export(recipe_for("cpu"), checkpoint, tmp_path / "bundle", "int4")
    plan_export(recipe_for("cpu", (QuantRule("*", block_size=16),)), checkpoint, tmp_path / "bundle", "int4")
    with pytest.raises(RecipeError, match=r"in 8 bits: experts have 4, give \*.experts.\* a rule of its own"):
        plan_export(recipe_for("cpu", (QuantRule("*", bits=8),)), checkpoint, tmp_path / "bundle", "int4")
    with pytest.raises(RecipeError, match=r"bits_per_weight is for models without experts"):
        plan_export(_calibrated(bits_per_weight=4.7), checkpoint, tmp_path / "bundle", "int4")


def test_groups_that_are_shut_give_no_expert_whatever_the_bias_is() -> None:
    """By DeepSeek's own way, which shuts them out for good, against one that tries every set of groups and experts."""
    random = np.random.default_rng(5)
    routing = Experts(8, 2, 32, normalized=True, scaling=2.5, groups=(4, 2))
    logits = random.standard_normal((64, 8)).astype(np.float32)
    bias = (random.standard_normal(8) - 1).astype(np.float32)  # mostly negative, where 0 would open them again
    found = routed_by_groups(routing, logits, bias)
    for row, weights in zip(logits, found, strict=True):
        affinity = 1 / (1 + np.exp(-row.astype(np.float64)))
        choice = affinity + bias
        opened = max(combinations(range(4), 2), key=lambda pair: sum(choice[2 * g] + choice[2 * g + 1] for g in pair))
        within = [e for g in opened for e in (2 * g, 2 * g + 1)]
        chosen = sorted(within, key=lambda e: -choice[e])[:2]
        expected = np.zeros(8)
        expected[chosen] = 2.5 * affinity[chosen] / affinity[chosen].sum()
        assert np.allclose(weights, expected, atol=1e-6)


LATENT_REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "more than open groups hold": ("deepseek_v3", {"num_experts_per_tok": 5}, "expected at most the 4 of open groups"),
    "uneven groups": ("deepseek_v3", {"n_group": 3}, "8 experts in 3 groups, 2 of them open: expected equal groups"),
    "more open than there are": ("deepseek_v3", {"topk_group": 5}, "5 of them open: expected equal groups"),
    "groups by the best": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy"},
        "topk_method 'group_limited_greedy'",
    ),
    "wide values": ("deepseek_v3", {"v_head_dim": 64}, "v_head_dim 64 is more than the 48 of a head's query"),
    "biases of experts": ("deepseek_v2", {"mlp_bias": True}, "mlp_bias is true, which is not supported"),
    "shares made whole": ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is true, which is not supported"),
    "shares of groups": ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob is false, and the operator"),
    "experts in turn": ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq is not supported, expected 1"),
}


@pytest.mark.parametrize("case", LATENT_REFUSED)
def test_routing_and_latents_that_contradict_each_other_are_refused(case: str) -> None:
    model_type, changes, message = LATENT_REFUSED[case]
    shape = {"model_type": model_type, "vocab_size": 96, "hidden_size": 64, "intermediate_size": 112}
    heads = {"num_attention_heads": 4, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        parse_config({**shape, **heads, **LATENT, **changes}, Path("config.json"))


def test_memory_does_not_grow_with_the_number_of_experts(tmp_path: Path) -> None:
    """24 and 72 experts of 3 MB in float32: what the reference holds, and what a packing pass does."""
    folder = _config_json(tmp_path, moe_intermediate_size=512, hidden_size=512, num_hidden_layers=1, mlp_only_layers=[])

    def held(work: Callable[[], object]) -> int:
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peaks = []
    for count in (24, 72):
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"num_experts": count}
        config = parse_config(raw, Path("config.json"))
        source = SyntheticWeights(config)
        source.read_rows("model.embed_tokens.weight", 0, 1)  # its table of random numbers is made once
        layout = plan_layout(config, TARGETS["cpu"], recipe_for("cpu"))
        out = tmp_path / str(count)
        out.mkdir()
        destinations = [Destination(layout, out)]
        peaks.append(
            (
                held(lambda source=source, config=config: reference_hidden(config, source, [IDS])),  # type: ignore[misc]
                held(lambda source=source, d=destinations: pack_weights(source, d)),  # type: ignore[misc]
            )
        )
    (few_read, few_packed), (many_read, many_packed) = peaks
    # 48 experts more are 151 MB of float32, and 22 MB packed.
    assert many_read - few_read < 6 << 20
    assert many_packed - few_packed < 6 << 20


def test_the_30b_plans_as_its_config_says(tmp_path: Path) -> None:
    recipe = load_recipe("qwen3-30b-a3b-cpu")
    facts = recipe.facts()
    assert facts is not None
    plan = plan_export(recipe, synthetic_checkpoint(facts), tmp_path / "bundle", "int4")
    experts = 48 * 128 * 3 * 768 * 2048
    of_experts = sum(
        slot.nbytes for name, unit in plan.layout.units.items() if ".experts." in name for slot in unit.slots
    )
    # 4 bits, a scale of 16 bits and a zero point of 4 for each block of 32.
    assert of_experts == experts * (4 + 20 / 32) / 8
    # One layer of it took 1,289 MB at `balanced`, most of it in its head (LOG.md).
    assert 1.289e9 < plan.peak_memory_bytes < 1.5e9
    assert plan.disk_needed_bytes > plan.layout.nbytes > 17e9


def test_what_is_remembered_leaves_experts_out() -> None:
    class Counting:
        def __init__(self) -> None:
            self.reads: list[str] = []

        def names(self) -> list[str]:
            return []

        def read(self, name: str) -> NDArray[np.float32]:
            self.reads.append(name)
            return np.zeros((2, 2), np.float32)

        def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
            return self.read(name)[start:stop]

    source = Counting()
    remembered = Remembered(source)
    plain, expert = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.experts.1.up_proj.weight"
    for name in (plain, plain, expert, expert):
        remembered.read(name)
        remembered.read_rows(name, 0, 1)
    assert source.reads.count(plain) == 2 and source.reads.count(expert) == 4
