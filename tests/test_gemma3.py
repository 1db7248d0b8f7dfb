"""Gemma 3: gains that count from 1, a stream in units of the embedding's factor, its decoder out of a model that sees,
and what it has no form for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests.graphs import recipe_for, write_graphs
from tests.random_models import CASES, greedy_by_transformers, make_checkpoint
from toolkit.checkpoint.config import parse_config, read_config
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.checkpoint.rotated import can_rotate, rotate
from toolkit.errors import UnsupportedError
from toolkit.evaluate.positions import open_positions
from toolkit.pipeline.plan import plan_export
from toolkit.reference.decoder import reference_logits
from toolkit.reference.greedy import greedy_continuations

IDS = [int(i) for i in np.random.default_rng(3).integers(3, 96, 24)]
TEXT, SHAPE = CASES["gemma3"]


def test_gains_count_from_one_and_the_stream_is_in_units_of_the_embedding(tmp_path: Path) -> None:
    model = make_checkpoint(TEXT, SHAPE, tmp_path)
    source, stored = open_checkpoint(tmp_path).source, dict(model.named_parameters())
    for module, factor in (("input_layernorm", 1.0), ("post_attention_layernorm", 1 / 8), ("self_attn.q_norm", 1.0)):
        name = f"model.layers.1.{module}.weight"
        assert np.allclose(source.read(name), (1 + stored[name].detach().numpy()) * factor, rtol=1e-6)
    assert np.array_equal(
        source.read("model.embed_tokens.weight"), stored["model.embed_tokens.weight"].detach().numpy()
    )
    assert read_config(tmp_path).stream_eps == pytest.approx(1e-6 / 64)


def test_the_reference_continues_as_transformers_does(tmp_path: Path) -> None:
    model = make_checkpoint(TEXT, SHAPE, tmp_path)
    prompts, source = [IDS[:9], IDS[5:20]], open_checkpoint(tmp_path).source
    found = greedy_continuations(read_config(tmp_path), source, prompts, 8, set())
    for prompt, made in zip(prompts, found, strict=True):
        assert made == greedy_by_transformers(model, prompt, len(made))


@pytest.mark.parametrize("written_by", ["transformers 4", "transformers 5"])
def test_the_decoder_of_a_model_that_sees_is_read_alone(written_by: str, tmp_path: Path) -> None:
    text = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_attention_heads": 4, **SHAPE}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Gemma3Config(
        text_config={**text, "initializer_range": 0.2},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=95,
        eos_token_id=[1, 7],
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    model.save_pretrained(tmp_path)
    if written_by == "transformers 5":
        stored = load_file(tmp_path / "model.safetensors")
        assert "language_model.model.norm.weight" in stored
        new = {name.replace("language_model.model.", "model.language_model."): value for name, value in stored.items()}
        save_file(new, tmp_path / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        oracle = model(torch.tensor([IDS])).logits[0].numpy()
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.eos_token_ids == (1, 7)
    assert "tensors beside the decoder" in " ".join(checkpoint.notes)
    (reference,) = reference_logits(checkpoint.config, checkpoint.source, [IDS])
    assert np.abs(reference - oracle).max() <= 1e-3
    write_graphs(tmp_path, tmp_path / "bundle")
    assert json.loads((tmp_path / "bundle" / "genai_config.json").read_text())["model"]["type"] == "gemma3_text"
    assert np.abs(open_positions(tmp_path / "bundle").logits(IDS, 10) - oracle).max() <= 1e-3


def test_a_config_of_transformers_5_has_a_rope_for_each_kind_of_layer() -> None:
    raw = {
        "model_type": "gemma3_text",
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        },
    }
    config = parse_config(raw, Path("config.json"))
    assert (config.rope.rope_type, config.rope.factor, config.rope.rope_theta) == ("linear", 8.0, 1e6)
    assert config.rope_of(None) == config.rope
    assert (config.rope_of(512).rope_type, config.rope_of(512).rope_theta) == ("default", 5e3)


@pytest.mark.parametrize("key", ["attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"])
def test_what_no_gemma_3_has_is_refused(key: str) -> None:
    with pytest.raises(UnsupportedError, match=f"config.json: {key} is True, which is not supported"):
        parse_config({"model_type": "gemma3_text", key: True}, Path("config.json"))
    with pytest.raises(
        UnsupportedError, match="hidden_activation 'silu' is not supported, expected 'gelu_pytorch_tanh'"
    ):
        parse_config({"model_type": "gemma3_text", "hidden_activation": "silu"}, Path("config.json"))


def test_norms_behind_sublayers_are_not_rotated_and_gelu_has_no_form_in_uint16(tmp_path: Path) -> None:
    make_checkpoint(TEXT, {**SHAPE, "tie_word_embeddings": False, "sliding_window": 64}, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert not can_rotate(checkpoint.config)
    with pytest.raises(UnsupportedError, match=r"gemma3_text has norms behind its sublayers.*set rotate=false"):
        rotate(checkpoint)
    lpbq = replace(recipe_for("qnn"), profile="lpbq")
    with pytest.raises(
        UnsupportedError, match="gemma3_text with gelu_pytorch_tanh has no form in uint16: set profile="
    ):
        plan_export(lpbq, checkpoint, tmp_path / "bundle", "int4")
