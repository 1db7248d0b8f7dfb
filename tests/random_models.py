"""Small random checkpoints of each family and RoPE, made by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_get_mscale

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.2, 1.7, 3.0, 6.0, 12.0, 24.0],
}


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "num_hidden_layers": 3}


LATENT = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
}


# Model classes and what their configs add, by the name a test shows.
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
    # A dense layer between two of experts, a window in all; shares of the chosen alone, and of all experts.
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 32, "norm_topk_prob": True, "mlp_only_layers": [1], **EXPERTS}),
    "qwen3-moe-shares-of-all": (
        "Qwen3Moe",
        {"head_dim": 32, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 5, **EXPERTS},
    ),
    # Experts of one tensor, with biases; a window in every second layer; sinks.
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "intermediate_size": 64,
            "sliding_window": 6,
            "rope_scaling": {**YARN, "truncate": False},
        },
    ),
    # Latents of both, a dense layer first, groups; values narrower than keys, and YaRN that sharpens scores.
    "deepseek-v3": (
        "DeepseekV3",
        {
            **LATENT,
            "q_lora_rank": 32,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "attention_bias": True,
            "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek-v2": (
        "DeepseekV2",
        {
            **LATENT,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.5,
            "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    # RoPE on 12 of 16 channels; a text of any length that fits here is a short one.
    "phi3": (
        "Phi3",
        {
            "partial_rotary_factor": 0.75,
            "rope_scaling": LONGROPE,
            "original_max_position_embeddings": 64,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
        },
    ),
    "phi3-sliding-narrow-heads": (
        "Phi3",
        {"hidden_size": 32, "partial_rotary_factor": 0.5, "sliding_window": 6, "pad_token_id": 0},
    ),
    # Both kinds of layers, each with its RoPE; a scale of attention that is not the heads' own.
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 32,
            "num_hidden_layers": 3,
            "sliding_window": 6,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 50,
            "rope_theta": 10000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0], "pad_token_id": 0}),
    "smollm3-tied-of-four": ("SmolLM3", {"num_hidden_layers": 4, "rope_scaling": YARN, "pad_token_id": 0}),
    "smollm3-narrow-heads": (
        "SmolLM3",
        {
            "no_rope_layers": [0, 1],
            "head_dim": 8,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
        },
    ),
    "smollm3-sliding": (
        "SmolLM3",
        {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 6, "pad_token_id": 0},
    ),
}


def greedy_by_transformers(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """The `count` tokens that transformers' model makes after a prompt, each the best of its logits."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def make_checkpoint(family: str, extra: dict[str, Any], folder: Path) -> PreTrainedModel:
    """Two layers with seeded weights, written to the folder; returns transformers' model of them."""
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
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")) or "norm" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.add_(torch.rand_like(buffer) * 0.3)  # positive: where it is not, transformers opens other groups
    if family == "DeepseekV2":  # transformers has YaRN sharpen its scores since its pull request 47435 alone
        magnitude = yarn_get_mscale(extra["rope_scaling"]["factor"], extra["rope_scaling"]["mscale_all_dim"])
        for layer in model.model.layers:
            layer.self_attn.scaling *= magnitude**2
    model.save_pretrained(folder)
    made: PreTrainedModel = model
    return made
