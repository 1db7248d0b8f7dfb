"""Where a bundle runs. A target is a row of data: stages, execution providers, devices, and what suits them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from toolkit import names

CPU_EP: Final = "CPUExecutionProvider"


@dataclass(frozen=True)
class Form:
    """How the transformer is written so that its execution provider takes every node.

    `activations` is the dtype of hidden states, norms, scales and the KV cache. `fused` allows com.microsoft's
    SkipSimplifiedLayerNormalization, FusedMatMul, biases inside MatMulNBits and q, k, v as one matrix; without it each
    is written in parts. `static_cache` fixes the cache at context_length. `local_window` is whether
    GroupQueryAttention may look back only so far.
    """

    activations: str = "float32"
    fused: bool = True
    static_cache: bool = False
    local_window: bool = True
    accuracy_level: int = 4


CPU_FORM: Final = Form()


@dataclass(frozen=True)
class Stage:
    """One graph file: who runs it, and the options its session needs. `sequence_length` 0 is any."""

    name: str
    execution_provider: str = CPU_EP
    device: str = "cpu"
    sequence_length: int = 0
    provider: str | None = None
    provider_options: Mapping[str, str] = field(default_factory=dict)
    session_options: Mapping[str, str] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The graph file."""
        return names.stage_file(self.name)


@dataclass(frozen=True)
class Target:
    """One row. `accelerator` is a stage without a name: what the transformer's stages have in common.

    `window` is the context stage's sequence length, 0 where the whole model is one graph. `quantize`,
    `context_length` and `validate` are the defaults of a checkpoint without a recipe of its own.
    """

    name: str
    accelerator: Stage
    form: Form
    window: int
    context_length: int
    quantize: tuple[dict[str, Any], ...]
    validate: dict[str, float]

    @property
    def partitioned(self) -> bool:
        """Whether a bundle is embeddings, context, iterator and lm_head rather than one model."""
        return self.window > 0

    def in_precision(self, precision: str) -> Target:
        """This row for `int4`, or for `fp32`, which computes in float32 everywhere."""
        return self if precision == "int4" else replace(self, form=replace(self.form, activations="float32"))

    def stages(self, window: int) -> tuple[Stage, ...]:
        """In the order they run; `window` is the recipe's."""
        if not self.partitioned:
            return (replace(self.accelerator, name=names.MODEL),)
        return (
            Stage(names.EMBEDDINGS),
            replace(self.accelerator, name=names.CONTEXT, sequence_length=window),
            replace(self.accelerator, name=names.ITERATOR, sequence_length=1),
            Stage(names.HEAD),
        )

    def data_file(self, role: str) -> str:
        """Where a tensor of this role lies."""
        if not self.partitioned:
            return names.MODEL_DATA_FILE
        outside = {"embed_tokens": names.EMBEDDINGS_DATA_FILE, "lm_head": names.HEAD_DATA_FILE}
        return outside.get(role, names.TRANSFORMER_DATA_FILE)


_CPU_RULES: Final = (
    {"match": "lm_head", "algorithm": "kquant", "bits": 8, "block_size": 128},
    {"match": "model.embed_tokens", "algorithm": "kquant", "bits": 4, "block_size": 32},
    {"match": "*", "algorithm": "kquant", "bits": 4, "block_size": 128},
)
# Embeddings and LM head in 4-bit blocks, whoever runs the rest.
_OUTSIDE_RULE: Final = {"match": "lm_head|model.embed_tokens", "algorithm": "kquant", "bits": 4, "block_size": 32}
_SPLIT_RULES: Final = (_OUTSIDE_RULE, {"match": "*", "algorithm": "kquant", "bits": 4, "block_size": 128})

TARGETS: Final[dict[str, Target]] = {
    "cpu": Target(
        name="cpu",
        accelerator=Stage(names.MODEL),
        form=CPU_FORM,
        window=0,
        context_length=4096,
        quantize=_CPU_RULES,
        validate={"mean_kld": 0.1},
    ),
    "cpu-split": Target(
        name="cpu-split",
        accelerator=Stage(names.CONTEXT),
        form=CPU_FORM,
        window=64,
        context_length=4096,
        quantize=_SPLIT_RULES,
        validate={"mean_kld": 0.1},
    ),
}
