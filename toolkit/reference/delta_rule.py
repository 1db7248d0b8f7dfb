"""Linear attention by the gated delta rule, token by token: what a state reads, forgets and writes.

Gated Delta Networks (arXiv 2412.06464), section 3.1: S_t = a_t S_{t-1} (I - b_t k_t k_t') + b_t v_t k_t' and
o_t = S_t q_t, where S is kept here as [key channels, value channels], the transpose.
T tokens, C channels of the convolution, H heads of values, K of keys, Dk and Dv their widths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.family import DeltaNet

Array = NDArray[np.float32]
_EPS = np.float32(1e-6)


@dataclass
class DeltaState:
    """What is remembered of a text: the convolution's last inputs [kernel - 1, C], each head's state [H, Dk, Dv]."""

    conv: Array
    recurrent: Array

    @classmethod
    def empty(cls, shape: DeltaNet) -> DeltaState:
        """Returns the state before the first token."""
        return cls(np.zeros(shape.conv_state[::-1], np.float32), np.zeros(shape.recurrent_state, np.float32))


def silu(x: Array) -> Array:
    """Returns each element of x times its own sigmoid."""
    return np.asarray(x / (1 + np.exp(-x)))


def convolved(state: DeltaState, x: Array, weight: Array) -> Array:
    """Returns SiLU of the causal convolution of [T, C] with each channel's `weight` [C, 1, kernel]; moves the state
    on."""
    kernel, T = weight.shape[-1], x.shape[0]
    seen = np.concatenate([state.conv, x])
    state.conv = seen[T:]
    made = np.zeros_like(x)
    for k in range(kernel):
        made += seen[k : k + T] * weight[:, 0, k]
    return silu(made)


def delta_rule(shape: DeltaNet, state: DeltaState, mixed: Array, decay: Array, write: Array) -> Array:
    """Returns each head's output [T, H, Dv] of the convolution's [T, C]; `decay` [T, H] is what part of the state is
    left at a token, `write` [T, H] how much of its value is written. Moves the state on."""
    T, K, Dk, H = mixed.shape[0], shape.linear_num_key_heads, shape.linear_key_head_dim, shape.linear_num_value_heads
    q, k, v = np.split(mixed, [shape.key_size, 2 * shape.key_size], axis=1)
    q, k = (np.repeat(_unit(x.reshape(T, K, Dk)), H // K, axis=1) for x in (q, k))
    q, v = q * np.float32(Dk**-0.5), v.reshape(T, H, -1)
    made, S = np.empty_like(v), state.recurrent
    for t in range(T):
        S = S * decay[t, :, None, None]
        held = (k[t, :, None, :] @ S)[:, 0]
        S = S + k[t, :, :, None] * ((v[t] - held) * write[t, :, None])[:, None, :]
        made[t] = (q[t, :, None, :] @ S)[:, 0]
    state.recurrent = S
    return made


def _unit(x: Array) -> Array:
    """Each vector of the last axis over its length."""
    return np.asarray(x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + _EPS))
