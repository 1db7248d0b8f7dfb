"""What a head that predicts one more token (MTP) has beside a decoder's layer, and what its model gives it.

B batch, S query length, D hidden.
"""

from __future__ import annotations

import onnx_ir as ir

from toolkit import names
from toolkit.checkpoint.anatomy import MtpInput
from toolkit.checkpoint.config import ModelConfig
from toolkit.graph.blocks import rms_norm
from toolkit.graph.builder import GraphBuilder, declare, value

_SHAPE = ("batch", "sequence")


def hidden_input(build: GraphBuilder, config: ModelConfig) -> ir.Value:
    """The graph's input of hidden states [B, S, D]: the model's behind its final norm, each of the position before the
    token that is embedded."""
    return value(names.HIDDEN_STATES, build.dtype, (*_SHAPE, config.hidden_size))


def hidden_output(build: GraphBuilder, config: ModelConfig, hidden: ir.Value, name: str) -> ir.Value:
    """Makes hidden states [B, S, D] behind the final norm an output of the graph."""
    return declare(hidden, name, build.dtype, (*_SHAPE, config.hidden_size))


def mtp_input(
    build: GraphBuilder, config: ModelConfig, mtp: MtpInput, embedded: ir.Value, hidden: ir.Value
) -> ir.Value:
    """What the head's layer reads [B, S, D], of the embedding of tokens and the hidden states before them."""
    e = rms_norm(build, "/model/mtp/enorm", embedded, mtp.enorm, config.rms_norm_eps)
    h = rms_norm(build, "/model/mtp/hnorm", hidden, mtp.hnorm, config.rms_norm_eps)
    (both,) = build.op("/model/mtp/Concat", [e, h], {"axis": -1})
    return build.linear("/model/mtp/eh_proj", both, mtp.eh_proj.module)
