"""Linear attention by the gated delta rule, in the operators that ONNX Runtime has for it.

B batch, S query length, D hidden, C channels of the convolution, K heads of keys of width Dk, H of values of width Dv.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.sublayers import LinearAttention
from toolkit.graph.builder import MS, GraphBuilder
from toolkit.graph.latent import Linears, flat, heads_of

# What is added to the square of a query's or key's length (transformers' l2norm).
_EPS = 1e-6


def linear_attention(
    build: GraphBuilder,
    config: ModelConfig,
    path: str,
    attention: LinearAttention,
    x: ir.Value,
    past: list[ir.Value],
    linear: Linears,
) -> tuple[ir.Value, list[ir.Value]]:
    """Turns [B, S, D] into ([B, S, H * Dv], the convolution's last inputs [B, C, kernel - 1] and the state
    [B, H, Dk, Dv])."""
    shape = attention.shape
    mixed, z, b, a = (linear(x, one) for one in attention.first)
    (turned,) = build.op(f"{path}/in/Transpose", [mixed], {"perm": [0, 2, 1]})
    convolved, conv_state = build.op(
        f"{path}/CausalConvWithState",
        [turned, build.vector(attention.conv1d), None, past[0]],
        {"ndim": 1, "activation": "silu"},
        MS,
        outputs=2,
    )
    (back,) = build.op(f"{path}/out/Transpose", [convolved], {"perm": [0, 2, 1]})
    sizes = [shape.key_size, shape.key_size, shape.value_size]
    parts = build.constant("/model/constants/delta_parts", np.array(sizes, np.int64))
    q, k, v = build.op(f"{path}/Split", [back, parts], {"axis": -1}, outputs=3)
    # A query is divided by the root of its width besides.
    width = shape.linear_key_head_dim
    q = _unit(build, f"{path}/q", attention, q, 1 / width)
    k = _unit(build, f"{path}/k", attention, k, width**-0.5)
    decay, write = _gates(build, path, attention, a, b)
    heads = {"q_num_heads": shape.linear_num_key_heads, "kv_num_heads": shape.linear_num_value_heads}
    y, state = build.op(
        f"{path}/LinearAttention",
        [q, k, v, past[1], decay, write],
        {**heads, "update_rule": "gated_delta", "scale": 1.0},
        MS,
        outputs=2,
    )
    given = [y, build.vector(attention.gated_norm), z]
    return build.op(f"{path}/GatedRMSNorm", given, {"epsilon": config.rms_norm_eps}, MS)[0], [conv_state, state]


def _unit(build: GraphBuilder, path: str, attention: LinearAttention, x: ir.Value, gain: float) -> ir.Value:
    """Divides each head of [B, S, K * Dk] by its length and multiplies it by `gain` times the root of Dk: an RMSNorm.

    x / sqrt(sum(x^2) + eps) is the RMSNorm of epsilon eps / Dk over the root of Dk.
    """
    width = attention.shape.linear_key_head_dim
    gains = build.constant(f"/model/constants/{path.rsplit('/', 1)[-1]}_length", np.full(width, gain, np.float32))
    op_type = "RMSNormalization" if build.form.opset >= 23 else "SimplifiedLayerNormalization"
    split = heads_of(build, path, x, attention.shape.linear_num_key_heads)
    (unit,) = build.op(f"{path}/{op_type}", [split, gains], {"axis": -1, "epsilon": _EPS / width})
    return flat(build, path, unit)


def _gates(
    build: GraphBuilder, path: str, attention: LinearAttention, a: ir.Value, b: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Returns the logarithm of what is left of the state, -exp(A_log) softplus(a + dt_bias), and the sigmoid of b,
    [B, S, H] each."""
    (rate,) = build.op(f"{path}/A_log/Exp", [build.vector(attention.A_log)])
    (negative,) = build.op(f"{path}/A_log/Neg", [rate])
    given = [a, build.vector(attention.dt_bias), negative, b]
    decay, write = build.op(f"{path}/LinearAttentionGate", given, {}, MS, outputs=2)
    return decay, write
