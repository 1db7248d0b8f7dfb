"""Qwen3.5: linear attention by the gated delta rule, and a gate on attention's output, beside transformers.

transformers 4 has the same arithmetic as Qwen3-Next, whose checkpoints have rows of the projections in another order:
by head of keys. A miniature of it is written here as Qwen3.5's are published.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.numpy import save_file
from transformers import PreTrainedModel

from tests.genai_tokens import greedy_by_genai
from tests.graphs import export_bundle, recipe_for, write_graphs
from tests.random_models import greedy_by_transformers
from toolkit.bundle.lint import lint_bundle
from toolkit.bundle.operators import bundle_placements, check_linear_attention
from toolkit.bundle.settings import read_genai_config
from toolkit.calibrate.tuning import check_tunable
from toolkit.checkpoint.adapter import merge_adapter
from toolkit.checkpoint.config import parse_config, read_config
from toolkit.checkpoint.family import DeltaNet
from toolkit.checkpoint.opened import open_checkpoint, synthetic_checkpoint
from toolkit.checkpoint.rotated import rotate
from toolkit.errors import CheckpointError, RecipeError, UnsupportedError
from toolkit.evaluate.parity import Comparison
from toolkit.evaluate.positions import open_positions
from toolkit.partition.stored import StoredTensors
from toolkit.pipeline.plan import plan_export
from toolkit.recipe import QuantRule
from toolkit.reference.decoder import reference_logits
from toolkit.reference.delta_rule import DeltaState, delta_rule
from toolkit.reference.greedy import greedy_continuations
from toolkit.target import CPU_FORM, TARGETS

Floats = NDArray[np.float32]
IDS = [int(i) for i in np.random.default_rng(3).integers(3, 96, 40)]
KINDS = ["linear_attention", "full_attention", "linear_attention"]
# Two heads of values for each of keys, wider than these; RoPE turns half of a head.
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "layer_types": KINDS,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}

CASES = {"a head of its own": {"tied": False}, "a tied head": {"tied": True}}


def _make(folder: Path, *, tied: bool = False) -> PreTrainedModel:
    """A checkpoint in Qwen3.5's form, a tower that sees and an MTP head beside its decoder; returns its oracle."""
    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(**SHAPE, num_experts=0, tie_word_embeddings=tied, initializer_range=0.2)
    model: PreTrainedModel = transformers.Qwen3NextForCausalLM(config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("dt_bias"):
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
        if "conv1d" in name:
            parameter.data.normal_(0, 0.5)
    tensors: dict[str, Floats] = {
        "model.visual.norm.weight": np.ones(4, np.float32),
        "mtp.fc.weight": np.ones(4, np.float32),
    }
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        place = name.replace("model.", "model.language_model.", 1)
        for module, rows in _published(place, tensor.numpy()).items():
            tensors[module] = np.ascontiguousarray(rows)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]}
    text = {key: value for key, value in SHAPE.items() if key != "partial_rotary_factor"}
    text |= {"model_type": "qwen3_5_text", "rope_parameters": rope, "attn_output_gate": True}
    whole = {"model_type": "qwen3_5", "text_config": text, "vision_config": {}, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    return model


def _published(name: str, rows: Floats) -> dict[str, Floats]:
    """A tensor of Qwen3-Next as Qwen3.5 has it: all queries, then all keys, and so on, in place of those of each head
    of keys together."""
    K, Dk, per, Dv = 2, 16, 2, 32
    if "in_proj_qkvz" in name:
        by_head = np.split(rows.reshape(K, -1, rows.shape[-1]), np.cumsum([Dk, Dk, per * Dv]), axis=1)
        q, k, v, z = (part.reshape(-1, rows.shape[-1]) for part in by_head)
        return {name.replace("qkvz", "qkv"): np.concatenate([q, k, v]), name.replace("qkvz", "z"): z}
    if "in_proj_ba" in name:
        b, a = (part.reshape(-1, rows.shape[-1]) for part in np.split(rows.reshape(K, -1, rows.shape[-1]), 2, axis=1))
        return {name.replace("_ba", "_b"): b, name.replace("_ba", "_a"): a}
    return {name: rows}


def _oracle(model: PreTrainedModel) -> Floats:
    with torch.no_grad():
        logits: Floats = model(torch.tensor([IDS])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("case", CASES)
def test_reference_and_graph_match_transformers(case: str, tmp_path: Path) -> None:
    model = _make(tmp_path, **CASES[case])
    oracle, checkpoint = _oracle(model), open_checkpoint(tmp_path)
    assert "not read: 2 tensors beside the decoder" in " ".join(checkpoint.notes)
    (reference,) = reference_logits(checkpoint.config, checkpoint.source, [IDS])
    assert np.abs(reference - oracle).max() <= 1e-3 < np.abs(oracle).max() / 1e3
    write_graphs(tmp_path, tmp_path / "bundle")
    bundle = open_positions(tmp_path / "bundle")
    # A prompt shorter than the convolution too, and the states that it leaves.
    for prompt in (None, 1, 2, 20):
        assert np.abs(bundle.logits(IDS, prompt) - oracle).max() <= 1e-3


def test_onnxruntime_genai_continues_as_transformers_does(tmp_path: Path) -> None:
    model = _make(tmp_path, tied=True)
    write_graphs(tmp_path, tmp_path / "bundle")
    made = greedy_by_transformers(model, IDS[:9], 24)
    expected = IDS[:9] + (made[: made.index(2) + 1] if 2 in made else made)
    path, settings = tmp_path / "bundle" / "genai_config.json", read_genai_config(tmp_path / "bundle")
    assert settings["model"]["type"] == "qwen3_5_text"
    # A prompt at once, and in pieces.
    for chunk in (settings["search"]["chunk_size"], 2):
        settings["search"]["chunk_size"] = chunk
        path.write_text(json.dumps(settings), encoding="utf-8")
        assert greedy_by_genai(tmp_path / "bundle", IDS[:9], len(expected)) == expected


def test_the_reference_continues_as_transformers_does(tmp_path: Path) -> None:
    model, prompts = _make(tmp_path), [IDS[:9], IDS[5:20]]
    found = greedy_continuations(read_config(tmp_path), open_checkpoint(tmp_path).source, prompts, 8, set())
    for prompt, made in zip(prompts, found, strict=True):
        assert made == greedy_by_transformers(model, prompt, len(made))


def test_the_delta_rule_is_the_papers() -> None:
    """Equation 10 of arXiv 2412.06464 in float64, with the state as the paper has it."""
    shape, rng = DeltaNet((0,), 1, 2, 4, 6, 4), np.random.default_rng(0)
    mixed = rng.standard_normal((5, shape.conv_size)).astype(np.float32)
    decay, write = rng.uniform(0.1, 1, (2, 5, 2)).astype(np.float32)
    state = DeltaState.empty(shape)
    found = np.concatenate([delta_rule(shape, state, mixed[s], decay[s], write[s]) for s in (slice(0, 2), slice(2, 5))])
    for head in range(2):
        S = np.zeros((6, 4))
        for t in range(5):
            q, k = (x / np.linalg.norm(x) for x in (mixed[t, :4].astype(np.float64), mixed[t, 4:8].astype(np.float64)))
            v = mixed[t, 8 + 6 * head : 14 + 6 * head]
            S = decay[t, head] * S @ (np.eye(4) - write[t, head] * np.outer(k, k)) + write[t, head] * np.outer(v, k)
            np.testing.assert_allclose(found[t, head], S @ q / 2, atol=1e-5)
        np.testing.assert_allclose(state.recurrent[head], S.T, atol=1e-5)


def test_each_row_of_q_proj_is_a_query_or_a_gate(tmp_path: Path) -> None:
    model, source = _make(tmp_path), open_checkpoint(tmp_path).source
    stored = dict(model.named_parameters())["model.layers.1.self_attn.q_proj.weight"].detach().numpy()
    query, gate = (f"model.layers.1.self_attn.{module}.weight" for module in ("q_proj", "q_gate_proj"))
    expected = stored.reshape(4, 2, 32, 64)[:, 1].reshape(128, 64)
    assert np.array_equal(source.read(gate), expected)
    assert np.array_equal(source.read_rows(gate, 5, 70), expected[5:70])
    scanned = {
        rows.name: source.decode(rows, 3, rows.stop)[:40] for rows in source.scan(1 << 12) if rows.name in (gate, query)
    }
    assert np.array_equal(scanned[gate], expected[3:43])
    assert np.array_equal(scanned[query], source.read(query)[3:43])


def test_a_rotated_stream_computes_the_same(tmp_path: Path) -> None:
    _make(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    plain, turned = (reference_logits(c.config, c.source, [IDS])[0] for c in (checkpoint, rotate(checkpoint)))
    assert np.abs(turned - plain).max() <= 1e-3


@pytest.mark.parametrize("rule", [QuantRule("*"), QuantRule("*", bits=8, symmetric=True)])
def test_a_graph_computes_its_own_rounded_weights(rule: QuantRule, tmp_path: Path) -> None:
    _make(tmp_path)
    config, checkpoint = read_config(tmp_path), open_checkpoint(tmp_path)
    layout = write_graphs(tmp_path, tmp_path / "bundle", recipe=recipe_for("cpu", (rule,)))
    stored = StoredTensors(layout, tmp_path / "bundle")
    (expected,), (exact,) = (reference_logits(config, source, [IDS]) for source in (stored, checkpoint.source))
    bundle = open_positions(tmp_path / "bundle", exact=True)
    for prompt in (None, 1, 9):
        assert np.abs(bundle.logits(IDS, prompt) - expected).max() <= 1e-3 < np.abs(expected - exact).max()
    # What decides how much is written and forgotten is not rounded.
    name = "model.layers.0.linear_attn.in_proj_{}.weight"
    assert [np.array_equal(stored.read(name.format(k)), checkpoint.source.read(name.format(k))) for k in "abz"] == [
        True,
        True,
        False,
    ]


def test_a_calibrated_bundle_diverges_less_and_has_no_fault_that_the_linter_knows(tmp_path: Path) -> None:
    """Random weights and a random text, judged by another one; projections are solved by GPTQ as any other linear."""
    _make(tmp_path)
    checkpoint = replace(synthetic_checkpoint(tmp_path), source=open_checkpoint(tmp_path).source)
    config, ids = checkpoint.config, np.random.default_rng(9).integers(3, 96, 150).tolist()
    (exact,) = reference_logits(config, checkpoint.source, [ids])
    recipe, found = replace(recipe_for("cpu"), quality="balanced", calibration_tokens=512), []
    bundle = export_bundle(recipe, checkpoint, tmp_path / "bundle")
    layout = write_graphs(tmp_path, tmp_path / "fast", recipe=recipe_for("cpu"))
    for stored in (StoredTensors(layout, bundle), StoredTensors(layout, tmp_path / "fast")):
        compared = Comparison()
        compared.add(exact, reference_logits(config, stored, [ids])[0], ids)
        found.append(compared.figures().mean_kld)
    assert found[0] < 0.95 * found[1], found
    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    algorithms = {row["name"]: row["algorithm"] for row in report["quantization"]["tensors"]}
    solved = [f"model.layers.0.linear_attn.{name}.weight" for name in ("in_proj_qkv", "in_proj_z", "out_proj")]
    assert {algorithms[name] for name in [*solved, "model.layers.1.self_attn.q_gate_proj.weight"]} == {"gptq"}
    assert lint_bundle(bundle) == []
    page = (bundle / "README.md").read_text(encoding="utf-8")
    assert "pip install 'onnxruntime>=1.32' 'onnxruntime-genai>=0.18.0'" in page
    assert [p.problems for p in bundle_placements(bundle, "cpu", 0)] == [()]
    settings = read_genai_config(bundle)
    settings["model"]["decoder"]["inputs"]["past_conv_names"] = "past.%d.conv"
    (bundle / "genai_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert any(
        "past_conv_names names 'past.0.conv', which the graph does not have" in line for line in lint_bundle(bundle)
    )


def test_the_plan_counts_states_once(tmp_path: Path) -> None:
    _make(tmp_path)
    checkpoint = synthetic_checkpoint(tmp_path)
    plan = plan_export(recipe_for("cpu"), checkpoint, tmp_path / "bundle", "int4")
    # A key and a value of two heads for each token in one layer; in two layers the convolution's and the rule's state.
    assert plan.kv_cache_bytes == 4 * (64 * 2 * 2 * 32 + 2 * (192 * 3 + 4 * 16 * 32))


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "cpu"])
def test_no_other_target_has_it(target: str, tmp_path: Path) -> None:
    _make(tmp_path)
    words = "stages pass no states on" if target == "cpu-split" else "LinearAttention is not among its operators"
    with pytest.raises(UnsupportedError, match=f"qwen3_5 has linear attention: .*{words}.*convert it for target cpu"):
        check_linear_attention(TARGETS[target], read_config(tmp_path))


def test_guesses_are_refused(tmp_path: Path) -> None:
    _make(tmp_path)
    recipe = replace(recipe_for("cpu"), speculation="ngram")
    with pytest.raises(
        UnsupportedError, match=r"linear attention, whose state cannot be taken back.*leave speculation"
    ):
        plan_export(recipe, synthetic_checkpoint(tmp_path), tmp_path / "bundle", "int4")


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    _make(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    with pytest.raises(
        UnsupportedError, match=r"q_proj of a qwen3_5 has gates between its queries.*merge it with PEFT"
    ):
        merge_adapter(synthetic_checkpoint(tmp_path), tmp_path)


def test_tuning_is_refused(tmp_path: Path) -> None:
    _make(tmp_path)
    with pytest.raises(RecipeError, match=r"tuning_steps is for models without linear attention.*set it to 0"):
        check_tunable(read_config(tmp_path), CPU_FORM)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no gate": ({"attn_output_gate": False}, "attn_output_gate is False, which is not supported: expected True"),
    "biases": ({"attention_bias": True}, "attention_bias is True, which is not supported: expected False"),
    "an unknown kind": (
        {"layer_types": ["mamba"] * 3},
        "expected full_attention or linear_attention for each of the 3",
    ),
    "odd heads": ({"linear_num_key_heads": 3}, "linear_num_key_heads 3 cannot serve linear_num_value_heads 4 evenly"),
    "no cache": ({"layer_types": ["linear_attention"] * 3}, "layer_types has no full_attention"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fields_that_have_no_form_are_refused(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        parse_config({"model_type": "qwen3_5_text", **SHAPE, **changes}, Path("config.json"))


def test_every_fourth_layer_has_attention_unless_a_config_says_otherwise() -> None:
    raw = {key: value for key, value in SHAPE.items() if key not in ("layer_types", "partial_rotary_factor")}
    config = parse_config({"model_type": "qwen3_5_text", **raw, "num_hidden_layers": 8}, Path("config.json"))
    assert config.structure.delta_net and config.structure.delta_net.layers == (0, 1, 2, 4, 5, 6)
    assert config.rotary_head_dim == 8
