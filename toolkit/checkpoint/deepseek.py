"""What the config.json of DeepSeek-V2 and V3 says alike: latent attention, and which layers have which experts."""

from __future__ import annotations

from toolkit.checkpoint.family import Experts, Latent, Structure
from toolkit.checkpoint.fields import Fields
from toolkit.errors import CheckpointError, UnsupportedError


def deepseek(read: Fields, layers: int, groups: tuple[int, int] | None, *, normalized: bool) -> Structure:
    """The structure of a config whose router has these groups.

    Raises UnsupportedError for layers with experts in turn, CheckpointError for more experts a token than there are.
    """
    if read.count("moe_layer_freq", 1) != 1:
        raise UnsupportedError(f"{read.path}: moe_layer_freq is not supported, expected 1")
    latent = Latent(
        read.count("kv_lora_rank"),
        read.count("qk_nope_head_dim"),
        read.count("qk_rope_head_dim"),
        read.count("v_head_dim"),
        None if read.get("q_lora_rank") is None else read.count("q_lora_rank"),
    )
    if latent.v_head_dim > latent.qk_head_dim:
        raise UnsupportedError(
            f"{read.path}: v_head_dim {latent.v_head_dim} is more than the {latent.qk_head_dim} of a head's query"
        )
    count, per_token = read.count("n_routed_experts"), read.count("num_experts_per_tok")
    open_experts = count // groups[0] * groups[1] if groups else count
    if per_token > open_experts:
        raise CheckpointError(
            f"{read.path}: num_experts_per_tok is {per_token}, expected at most the {open_experts} of open groups"
        )
    width = read.count("moe_intermediate_size")
    experts = Experts(
        count,
        per_token,
        width,
        normalized=normalized,
        dense_layers=tuple(range(min(layers, read.count("first_k_dense_replace", least=0)))),
        shared_intermediate_size=width * read.count("n_shared_experts", 0, least=0),
        scaling=read.positive("routed_scaling_factor", 1.0),
        groups=groups,
    )
    biased = read.flag("attention_bias", default=False)  # of what reads the stream, and of what writes it
    return Structure(qkv_bias=biased, o_bias=biased, experts=experts, latent=latent)
