"""DeepSeek-V2-Lite: latent attention, shares over all experts. modeling_deepseek_v2.py of transformers."""

from __future__ import annotations

from toolkit.checkpoint.deepseek import deepseek
from toolkit.checkpoint.family import Family, Structure
from toolkit.checkpoint.fields import Fields
from toolkit.errors import UnsupportedError


def _structure(read: Fields, layers: int) -> Structure:
    if read.get("topk_method") != "greedy":
        raise UnsupportedError(
            f"{read.path}: topk_method {read.get('topk_method')!r:.40} is not supported, expected 'greedy'"
        )
    for key in ("norm_topk_prob", "mlp_bias"):
        # The first is read by the model's own code and not by transformers, and no published model has either.
        if read.flag(key, default=False):
            raise UnsupportedError(f"{read.path}: {key} is true, which is not supported in deepseek_v2: expected false")
    return deepseek(read, layers, None, normalized=False)


FAMILY = Family(
    "deepseek_v2",
    _structure,
    defaults={
        "topk_method": "greedy",
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "moe_intermediate_size": 1407,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
    default_positions=2048,
)
