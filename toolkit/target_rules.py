"""The formats of each target's matrices where a recipe does not say them, and what they cost a trained model."""

from __future__ import annotations

from typing import Final

from toolkit.algorithms import AUTO

# What formats cost Qwen2.5-Coder-0.5B and are worth (LOG.md). k and v are 1.5% of a layer and a tenth of what it loses,
# so they have 8 bits, and so has what makes them of a latent. Blocks of 32 in embedding and head instead of 64 are a
# fifth less, layers in 64 a third more.
_WIDE_KEYS: Final = {"match": "*.k_proj|*.v_proj|*.kv_a_proj_with_mqa|*.kv_b_proj", "bits": 8, "block_size": 32}
# Also what WebGPU's kernels are made for; k and v of other bits than q would not be packed with it.
BLOCKS_OF_32: Final = ({"match": "*", "bits": 4, "block_size": 32},)
# For DirectML, whose kernel takes any block.
NARROW_RULES: Final = (_WIDE_KEYS, *BLOCKS_OF_32)
# For a CPU, whose kernel multiplies blocks of 128 half as fast again as those of 32 and reads a quarter less of them:
# what a token reads of a large model. The embedding, of which it reads a row, keeps 32, and so do experts.
CPU_RULES: Final = (
    {**_WIDE_KEYS, "block_size": AUTO},
    {"match": "model.embed_tokens|*.experts.*", "bits": 4, "block_size": 32},
    {"match": "*", "bits": 4, "block_size": AUTO},
)
# Blocks of 16 where they are worth most: not in the embedding, nor in gate and up, which are more than half of a layer.
BEST_CPU_RULES: Final = (
    _WIDE_KEYS,
    {"match": "model.embed_tokens|*.gate_proj|*.up_proj", "bits": 4, "block_size": 32},
    {"match": "*", "bits": 4, "block_size": 16},
)
# Embeddings and LM head in 4-bit blocks, whoever runs the rest.
_OUTSIDE_RULE: Final = {"match": "lm_head|model.embed_tokens", "bits": 4, "block_size": 32}
# AMD's NPU takes 4 bits alone, in blocks of 32 to 128; 128 is what AMD gives its own models.
VITISAI_RULES: Final = (_OUTSIDE_RULE, {"match": "*", "bits": 4, "block_size": AUTO})

# Intel's NPU is documented with symmetric blocks of 128 or whole rows. k and v in 8 bits are worth a quarter of what
# such a model loses.
OPENVINO_RULES: Final = (
    _OUTSIDE_RULE,
    {**_WIDE_KEYS, "block_size": 128, "symmetric": True},
    {"match": "*", "bits": 4, "block_size": 128, "symmetric": True},
)

# A block's scale is a byte in the compiled binary, so that blocks of 16 weigh 4.5 bits there where those of 64 weigh
# 4.125; they make up for what integers without zero points lose beside a CPU's blocks of 32 (LOG.md).
QNN_RULES: Final = (_OUTSIDE_RULE, _WIDE_KEYS, {"match": "*", "bits": 4, "block_size": 16})

# The mean KLD that their own rules cost Qwen2.5-Coder-0.5B-Instruct at `balanced` (docs/measured.md); plain rounding
# (rtn) costs it .067 in blocks of 32 with zero points, .0975 without, .121 in OpenVINO's formats.
KLD_OF_32: Final = 0.0205
KLD_OF_32_THROUGHOUT: Final = 0.023
KLD_OF_LPBQ_16: Final = 0.0235
KLD_OF_128_SYMMETRIC: Final = 0.037
