"""Families without a form of their own, traced by torch and run by onnxruntime-genai: transformers is the oracle.

Each is a random miniature with what is its own: norms behind sublayers and over all heads, multipliers, layers side by
side, LayerNorm, partial and interleaved RoPE, q, k, v in one tensor, tied heads.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import toolkit
from tests.random_models import greedy_by_transformers, make_checkpoint
from toolkit.checkpoint.any_decoder import open_any_decoder
from toolkit.errors import UnsupportedError
from toolkit.evaluate.positions import open_positions
from toolkit.evaluate.session import continuations
from toolkit.partition.stored import StoredTensors
from toolkit.pipeline.plan import ExportPlan
from toolkit.trace.reference import TransformersDecoder
from toolkit.trace.traced import trace_decoder

FAMILIES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "olmo2": ("Olmo2", {}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0156,
            "tie_word_embeddings": True,
        },
    ),
    "cohere": ("Cohere", {"pad_token_id": 0}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "falcon": (
        "Falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "bias": False, "ffn_hidden_size": 112},
    ),
    "glm": ("Glm", {"head_dim": 16, "pad_token_id": 0}),
}
PROMPT: Final = [5, 17, 42, 9, 33, 80, 11]
# The config's and the tokenizer's.
STOPS: Final = (2, 764)
IDS: Final = [int(i) for i in np.random.default_rng(0).integers(3, 700, 24)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A folder with the checkpoint, and transformers' model of it; tiny-r1's tokenizer, whose ids it has rows for."""
    folder = tmp_path_factory.mktemp("traced") / str(request.param)
    name, extra = FAMILIES[str(request.param)]
    model = make_checkpoint(name, {**extra, "vocab_size": 776}, folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(__file__).parents[2] / "models" / "tiny-r1" / file, folder / file)
    return folder, model


def _made(folder: Path, precision: str) -> tuple[ExportPlan, Path]:
    plans = toolkit.plan("cpu", checkpoint=folder, trace=True, precision=precision, out=folder.parent / precision)
    return plans[0], toolkit.export(plans)[0]


def _errors(bundle: Path, model: PreTrainedModel) -> list[float]:
    """The largest error of a logit at once, and with the cache behind the first 9 tokens, activations exact."""
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    session = open_positions(bundle, exact=True)
    return [float(np.abs(session.logits(IDS, prompt) - expected).max()) for prompt in (None, 9)]


def test_floats_are_transformers_own_and_so_are_greedy_tokens(family: tuple[Path, PreTrainedModel]) -> None:
    folder, model = family
    _, bundle = _made(folder, "fp32")
    assert max(_errors(bundle, model)) < 1e-3
    expected = greedy_by_transformers(model, PROMPT, 32)
    ends = [k + 1 for k, token in enumerate(expected) if token in STOPS]
    assert continuations(bundle, [PROMPT], 32) == [expected[: min([*ends, 32])]]
    (own,) = TransformersDecoder(folder).logits([IDS])
    with torch.no_grad():
        assert np.abs(own - model(torch.tensor([IDS])).logits[0].numpy()).max() < 1e-4


def test_four_bits_are_transformers_over_the_stored_weights(family: tuple[Path, PreTrainedModel]) -> None:
    """Every product but those of activations is packed, and the weights that transformers gets are the file's own."""
    folder, model = family
    plan, bundle = _made(folder, "int4")
    kept = {unit.name: unit.spec for unit in plan.layout.matrices() if unit.spec is None}
    assert kept == {} and plan.bits_per_weight < 6
    stored = StoredTensors(plan.layout, bundle)
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        for name, tensor in model.state_dict().items():
            if name in stored.names():
                tensor.copy_(torch.from_numpy(np.array(stored.read(name))))
        assert max(_errors(bundle, model)) < 1e-3
    finally:
        model.load_state_dict(exact)


@pytest.mark.parametrize(
    ("kind", "reason"), [("mamba", "keeps no keys and values of earlier tokens"), ("mixtral", "cannot be traced")]
)
def test_what_cannot_be_traced_is_said_in_a_line(kind: str, reason: str, tmp_path: Path) -> None:
    """A model with a state in place of a cache, and one whose experts are chosen in loops over what is in a tensor."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    AutoConfig.for_model(kind, vocab_size=96, intermediate_size=64, pad_token_id=0, **sizes).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=reason) as caught:
        trace_decoder(tmp_path, tmp_path / "graph.onnx", kind)
    assert "\n" not in str(caught.value)


def test_a_bundle_says_that_it_was_traced(family: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = family
    _, bundle = _made(folder, "fp32")
    report = toolkit.validate(bundle, effort=toolkit.Effort(tokens=100, speed=False))
    assert report.form == "traced, unfused" and report.verdict and report.verdict.passed
    assert report.parity and report.parity.reference.startswith("transformers")
    assert open_any_decoder(folder).config.traced
    assert "traced, unfused" in (bundle / "README.md").read_text(encoding="utf-8")
