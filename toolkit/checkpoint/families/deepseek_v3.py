"""DeepSeek-V3 and R1: latent attention, experts by groups. modeling_deepseek_v3.py of transformers, and the model's own
inference code, which shuts groups out for good where transformers gives them affinities of 0."""

from __future__ import annotations

from dataclasses import replace

from toolkit.checkpoint.deepseek import deepseek
from toolkit.checkpoint.family import Family, Structure
from toolkit.checkpoint.fields import Fields
from toolkit.errors import CheckpointError, UnsupportedError


def _structure(read: Fields, layers: int) -> Structure:
    if not read.flag("norm_topk_prob", default=True):
        raise UnsupportedError(
            f"{read.path}: norm_topk_prob is false, and the operator of groups normalises: expected true"
        )
    experts, groups, opened = (read.count(key) for key in ("n_routed_experts", "n_group", "topk_group"))
    if experts % groups or experts // groups < 2 or opened > groups:
        raise CheckpointError(
            f"{read.path}: {experts} experts in {groups} groups, {opened} of them open: expected equal groups of two "
            "experts or more, and no more open than there are"
        )
    further = read.count("num_nextn_predict_layers", 0, least=0)
    return replace(deepseek(read, layers, (groups, opened), normalized=True), num_nextn_predict_layers=further)


FAMILY = Family(
    "deepseek_v3",
    _structure,
    defaults={
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "moe_intermediate_size": 2048,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
    default_positions=4096,
)
