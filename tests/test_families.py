"""The reference against Hugging Face transformers, and the fp32 graph against both, for each family and RoPE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

from tests.graphs import WINDOW, write_graphs
from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.weights import open_weights
from toolkit.errors import UnsupportedError
from toolkit.evaluate.positions import open_positions
from toolkit.reference.decoder import reference_logits
from toolkit.target import TARGETS

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen2-yarn": ("Qwen2", {"rope_scaling": YARN}),
    "qwen2-sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "llama": ("Llama", {}),
    "llama-llama3": ("Llama", {"rope_scaling": LLAMA3}),
    "llama-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama-narrow-heads": ("Llama", {"head_dim": 8, "attention_bias": True, "rope_scaling": LLAMA3}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-sliding": ("Mistral", {"sliding_window": 6}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-yarn": ("Qwen3", {"head_dim": 32, "rope_scaling": YARN}),
}


def make_checkpoint(family: str, extra: dict[str, Any], folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **extra,
        }
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_reference_and_graph_match_transformers(case: str, tmp_path: Path) -> None:
    family, extra = CASES[case]
    model = make_checkpoint(family, extra, tmp_path)
    ids = [int(i) for i in np.random.default_rng(3).integers(3, 96, 40)]
    with torch.no_grad():
        oracle = model(torch.tensor([ids])).logits[0].numpy()
    config = read_config(tmp_path)
    source = open_weights(tmp_path, config)
    (reference,) = reference_logits(config, source, [ids])
    assert np.abs(reference - oracle).max() <= 1e-3
    for target, row in TARGETS.items():
        if any(config.sliding_windows) and not row.form.local_window:
            with pytest.raises(UnsupportedError, match=r"knows no sliding window.*context_length=[56]"):
                write_graphs(tmp_path, tmp_path / target, target)
            continue
        write_graphs(tmp_path, tmp_path / target, target)
        for graph in (tmp_path / target).glob("*.onnx"):
            # onnx does not know ORT's SimplifiedLayerNormalization, which lives in the default domain.
            if row.form.opset >= 23:
                onnx.checker.check_model(str(graph))
        bundle = open_positions(tmp_path / target)
        assert np.abs(bundle.logits(ids) - oracle).max() <= 1e-3
        # The same tokens as a prompt and single steps: the cache, and sliding windows that move over it.
        for prompt in (1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 3):
            assert np.abs(bundle.logits(ids, prompt) - oracle).max() <= 1e-3


def test_reference_and_graph_match_transformers_on_a_trained_llama(stories260k: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32).eval()
    ids = [1, *(int(i) for i in np.random.default_rng(4).integers(3, 512, 55))]
    with torch.no_grad():
        oracle = model(torch.tensor([ids])).logits[0].numpy()
    config = read_config(stories260k)
    (reference,) = reference_logits(config, open_weights(stories260k, config), [ids])
    assert np.abs(reference - oracle).max() <= 1e-3
    for target in TARGETS:
        write_graphs(stories260k, tmp_path / target, target)
        assert np.abs(open_positions(tmp_path / target).logits(ids, prompt=20) - oracle).max() <= 1e-3
