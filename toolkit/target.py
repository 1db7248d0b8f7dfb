"""Where a bundle runs. A target is a row of data: stages, execution providers, devices, and what suits them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from toolkit import names
from toolkit.algorithms import AUTO
from toolkit.soc import SOCS, Soc
from toolkit.target_rules import (
    BEST_CPU_RULES,
    BLOCKS_OF_32,
    CPU_RULES,
    KLD_OF_32,
    KLD_OF_32_THROUGHOUT,
    KLD_OF_128_SYMMETRIC,
    KLD_OF_LPBQ_16,
    NARROW_RULES,
    OPENVINO_RULES,
    QNN_RULES,
    VITISAI_RULES,
)

CPU_EP: Final = "CPUExecutionProvider"
# Thoughts of thousands of tokens, where the cache takes only what a request asks for.
LONG_CONTEXT: Final = 16384
# Half of that where the cache is allocated whole, and attention reads it whole for every token.
NPU_CONTEXT: Final = 8192
# The CPU's GroupQueryAttention keeps every score of a prompt with all before it: 4,096 at once took five times the
# memory of these, and twice the time (LOG.md).
_CPU_CHUNK: Final = 512
_STOP_SPINNING: Final = {"session.force_spinning_stop": "1"}


@dataclass(frozen=True)
class Form:
    """How the transformer is written so that its execution provider takes every node.

    `activations` is the dtype of hidden states, norms, the KV cache and of scales without `short_scales`.
    RMSNormalization needs `opset` 23, an earlier one gets SimplifiedLayerNormalization. `fused` allows com.microsoft's
    SkipSimplifiedLayerNormalization and FusedMatMul, `packed_qkv` q, k and v as one matrix, `packed_kv` k
    and v as one where q is none of it, `bias_in_matmul`
    MatMulNBits' bias input and `rotary_in_attention` GroupQueryAttention's do_rotary; without them each is written in
    parts.
    `plain_attention` does without GroupQueryAttention, which takes a `static_cache`: one fixed at context_length.
    `local_window` is whether GroupQueryAttention may look back only so far, `wide_bits` whether the provider takes
    MatMulNBits of 8 bits, which a budget may then buy, and `head_norms` whether it takes what stands around a norm over
    heads; where not, those nodes run on the CPU. `annotated` are the paths whose nodes are
    marked, so that a session option keeps them on the CPU inside one graph.

    `qdq` puts linears and the MLP between QuantizeLinear and DequantizeLinear of uint16, whose ranges come from text,
    with signed integer weights: 4 bits with a scale a block (LPBQ), or a row where `row_scales`, and 8 bits with a
    scale a row.

    `short_scales` stores scales of blocks as bfloat16 behind a Cast to float32, which ONNX Runtime takes away when it
    opens a graph for the CPU: kernels get float32 as ever, the file is half a bit a weight smaller in blocks of 32.
    `short_outside` does so in embedding and LM head, which the CPU computes on most targets; the WebGPU build of
    onnxruntime-web has no such Cast.

    `latent_cache` keeps the latents of latent attention in place of every head's keys and values: a cache many times
    smaller, which grows at every token.
    """

    activations: str = "float32"
    opset: int = 23
    fused: bool = True
    packed_qkv: bool = True
    packed_kv: bool = False
    bias_in_matmul: bool = True
    rotary_in_attention: bool = True
    plain_attention: bool = False
    static_cache: bool = False
    local_window: bool = True
    wide_bits: bool = True
    accuracy_level: int = 4
    head_norms: bool = True
    annotated: tuple[str, ...] = ()
    qdq: bool = False
    row_scales: bool = False
    short_scales: bool = True
    short_outside: bool = True
    latent_cache: bool = False


@dataclass(frozen=True)
class Profile:
    """One of the ways a target's transformer may be written. `rotates` is whether it is turned by Hadamards first
    unless the recipe says otherwise, `provider_options` and `session_options` what has to be told besides."""

    name: str
    form: Form
    rotates: bool = False
    provider_options: Mapping[str, str] = field(default_factory=dict)
    session_options: Mapping[str, str] = field(default_factory=dict)


# A small product costs a CPU core a fixed price a token, so k and v are one.
CPU_FORM: Final = Form(packed_kv=True)


@dataclass(frozen=True)
class Stage:
    """One graph file: who runs it, and the options its session needs. `sequence_length` 0 is any; `part` is which part
    of the transformer it is.

    `chunk_size` is how many tokens of a prompt onnxruntime-genai gives it at once, 0 all of them. `provider` is
    onnxruntime-genai's name of the execution provider, `package` what to install for it, and `plugin` the
    module of that package with a `get_library_path`, where the provider is a plugin. `threads` 0 is one for each core.
    """

    name: str
    execution_provider: str = CPU_EP
    device: str = "cpu"
    sequence_length: int = 0
    chunk_size: int = 0
    provider: str | None = None
    package: str = ""
    plugin: str = ""
    provider_options: Mapping[str, str] = field(default_factory=dict)
    session_options: Mapping[str, str] = field(default_factory=dict)
    threads: int = 0
    part: int = 0

    @property
    def kind(self) -> str:
        """Its name without the number of its part: `context`, `iterator`."""
        return names.stage_kind(self.name)

    @property
    def file(self) -> str:
        """The name of the stage's graph file."""
        return names.stage_file(self.name)


@dataclass(frozen=True)
class Target:
    """One row. `accelerator` is a stage without a name: what the transformer's stages have in common.

    `window` is the context stage's sequence length, 0 where the whole model is one graph. `soc` names what its stages
    are compiled for ahead of time, in parts of limited size, where there is such a step. `profiles` are the forms
    that a recipe chooses from where there are several, its default first; `form` is what needs no text. `quantize` and
    `context_length` are what a recipe has that does not say them, and `best` the rules instead at that quality, where
    they differ. `measured_kld` is what `quantize` cost Qwen2.5-Coder-0.5B-Instruct, which thresholds follow from.
    `speculates` is whether several guessed tokens can be read at once behind those that the cache has.
    """

    name: str
    accelerator: Stage
    form: Form
    window: int
    context_length: int
    quantize: tuple[dict[str, Any], ...]
    measured_kld: float
    soc: str = ""
    profiles: tuple[Profile, ...] = ()
    best: tuple[dict[str, Any], ...] = ()
    speculates: bool = False

    def defaults(self, quality: object = None) -> dict[str, Any]:
        """What a recipe for this target has at a quality for each key that it does not say; a fresh object each
        time."""
        rules = self.best if self.best and quality == "best" else self.quantize
        return {
            "context_length": self.context_length,
            "quantize": [dict(rule) for rule in rules],
            "validate": {"mean_kld": AUTO},
            "window": self.window,
            "soc": self.soc,
            "profile": next((profile.name for profile in self.profiles), ""),
        }

    @property
    def own_matches(self) -> frozenset[str]:
        """Returns the globs of its own rules, which are made for the names of most families: one may find nothing."""
        return frozenset(str(rule["match"]) for rule in (*self.quantize, *self.best))

    @property
    def partitioned(self) -> bool:
        """Returns whether a bundle is embeddings, context, iterator and lm_head rather than one model."""
        return self.window > 0

    def in_precision(self, precision: str) -> Target:
        """This row for `int4`, or for `fp32`, which computes in float32 everywhere."""
        return self if precision == "int4" else replace(self, form=replace(self.form, activations="float32", qdq=False))

    def rotates(self, profile: str) -> bool:
        """Whether a profile wants rotated weights."""
        return any(known.rotates for known in self.profiles if known.name == profile)

    def in_profile(self, name: str) -> Target:
        """Returns this row in one of its profiles, or as it is where no profile is named."""
        if not name:
            return self
        profile = next(profile for profile in self.profiles if profile.name == name)
        options = {**self.accelerator.provider_options, **profile.provider_options}
        session = {**self.accelerator.session_options, **profile.session_options}
        accelerator = replace(self.accelerator, provider_options=options, session_options=session)
        return replace(self, form=profile.form, accelerator=accelerator)

    def on_soc(self, soc: Soc) -> Target:
        """This row for another SoC than its own."""
        options = {**self.accelerator.provider_options, **soc.provider_options}
        return replace(self, accelerator=replace(self.accelerator, provider_options=options), soc=soc.name)

    def stages(self, window: int, parts: int = 1) -> tuple[Stage, ...]:
        """In the order they run; `window` and `parts`, of the transformer, are the recipe's.

        Each session has threads of its own, which would spin for work after their stage is done, on the cores of the
        next: decoding was half as fast (LOG.md).
        """
        if not self.partitioned:
            return (replace(self.accelerator, name=names.MODEL),)
        transformer = self.accelerator
        if transformer.execution_provider == CPU_EP:
            transformer = replace(transformer, session_options=_STOP_SPINNING)
        return (
            Stage(names.EMBEDDINGS, threads=1),
            *(
                replace(transformer, name=names.part_stage(kind, part, parts), sequence_length=length, part=part)
                for kind, length in ((names.CONTEXT, window), (names.ITERATOR, 1))
                for part in range(parts)
            ),
            Stage(names.HEAD, session_options=_STOP_SPINNING),
        )

    def data_file(self, role: str) -> str:
        """Where a tensor of this role lies: apart wherever another target may share it."""
        if not self.partitioned and self.accelerator.execution_provider == CPU_EP:
            return names.MODEL_DATA_FILE
        outside = {"embed_tokens": names.EMBEDDINGS_DATA_FILE, "lm_head": names.HEAD_DATA_FILE}
        return outside.get(role, names.TRANSFORMER_DATA_FILE)


# Why each is as it is: bundle/operators.json, with sources.
_PARTS: Final = Form(
    packed_qkv=False, bias_in_matmul=False, local_window=False, opset=21, accuracy_level=0, short_scales=False
)
_DML_FORM: Final = replace(_PARTS, activations="float16", rotary_in_attention=False, annotated=names.OUTSIDE_PATHS)
_QNN_FORM: Final = replace(_PARTS, opset=23, activations="float16", fused=False, static_cache=True)
# On the CPU ORT would round the inputs of int4 products to int8, which the NPU does not.
_EXACT_INPUTS: Final = {"session.qdq_matmulnbits_accuracy_level": "1"}
_QNN_PROFILES: Final = (
    Profile(
        "lpbq",
        replace(_QNN_FORM, qdq=True),
        session_options=_EXACT_INPUTS,
        provider_options={"enable_block_quant_weight_optimization": "1"},
    ),
    Profile("row-scales", replace(_QNN_FORM, qdq=True, row_scales=True), rotates=True, session_options=_EXACT_INPUTS),
    Profile("float16", _QNN_FORM),
)
_OPENVINO_FORM: Final = replace(
    _PARTS, activations="float16", plain_attention=True, static_cache=True, local_window=True
)
_VITISAI_FORM: Final = replace(_PARTS, static_cache=True, wide_bits=False, head_norms=False)

# One graph for GPUs: packed q, k, v and RoPE stay whole inside GroupQueryAttention, and only products that may round
# their input to int8 (accuracy_level 4) take the kernel that reads a prompt fast. What computes lengths is int64, which
# shaders have not.
_WEBGPU_FORM: Final = Form(
    activations="float16", opset=21, short_scales=False, short_outside=False, annotated=(names.LENGTHS_PATH,)
)
_WEBGPU_PROFILES: Final = (
    Profile("gpu-head", _WEBGPU_FORM),
    Profile("cpu-head", replace(_WEBGPU_FORM, annotated=(names.LENGTHS_PATH, *names.OUTSIDE_PATHS))),
)
# Read by ONNX Runtime from 1.25 on; `=` makes it the whole annotation, not a prefix.
# A cache of heads is allocated whole and written in place, one of latents is a tenth or less of it and copied at every
# token; texts of ten thousands of tokens want the second.
_CPU_PROFILES: Final = (Profile("", CPU_FORM), Profile("latent-cache", replace(CPU_FORM, latent_cache=True)))
_KEPT_ON_CPU: Final = {"session.layer_assignment_settings": f"{CPU_EP}(={names.OUTSIDE_ANNOTATION})"}

TARGETS: Final[dict[str, Target]] = {
    "cpu": Target(
        name="cpu",
        accelerator=Stage(names.MODEL, chunk_size=_CPU_CHUNK),
        form=CPU_FORM,
        window=0,
        context_length=LONG_CONTEXT,
        quantize=CPU_RULES,
        best=BEST_CPU_RULES,
        measured_kld=KLD_OF_32,
        profiles=_CPU_PROFILES,
        speculates=True,
    ),
    "cpu-split": Target(
        name="cpu-split",
        accelerator=Stage(names.CONTEXT),
        form=CPU_FORM,
        window=64,
        context_length=4096,
        quantize=CPU_RULES,
        best=BEST_CPU_RULES,
        measured_kld=KLD_OF_32,
    ),
    "dml": Target(
        name="dml",
        accelerator=Stage(
            names.MODEL,
            execution_provider="DmlExecutionProvider",
            device="gpu",
            provider="dml",
            package="onnxruntime-genai-winml (Windows)",
            # Nodes of the CPU stand between DirectML's, and a captured graph may hold none.
            provider_options={"enable_graph_capture": "0"},
            session_options=_KEPT_ON_CPU,
        ),
        form=_DML_FORM,
        window=0,
        context_length=LONG_CONTEXT,
        quantize=NARROW_RULES,
        measured_kld=KLD_OF_32,
    ),
    "openvino": Target(
        name="openvino",
        accelerator=Stage(
            names.CONTEXT,
            execution_provider="OpenVINOExecutionProvider",
            device="npu",
            provider="OpenVINO",
            package="onnxruntime-openvino",
            provider_options={"device_type": "NPU"},
        ),
        form=_OPENVINO_FORM,
        window=64,
        context_length=NPU_CONTEXT,
        quantize=OPENVINO_RULES,
        measured_kld=KLD_OF_128_SYMMETRIC,
    ),
    "qnn": Target(
        name="qnn",
        accelerator=Stage(
            names.CONTEXT,
            execution_provider="QNNExecutionProvider",
            device="npu",
            provider="qnn",
            package="onnxruntime-qnn",
            plugin="onnxruntime_qnn",
            provider_options={
                "backend_path": "QnnHtp.dll",
                # Without a SoC every MatMulNBits falls to the CPU.
                **SOCS["x-elite"].provider_options,
                "htp_performance_mode": "burst",
                "htp_graph_finalization_optimization_mode": "3",
            },
        ),
        form=_QNN_FORM,
        window=64,
        context_length=NPU_CONTEXT,
        quantize=QNN_RULES,
        measured_kld=KLD_OF_LPBQ_16,
        soc="x-elite",
        profiles=_QNN_PROFILES,
    ),
    "vitisai": Target(
        name="vitisai",
        accelerator=Stage(
            names.CONTEXT,
            execution_provider="VitisAIExecutionProvider",
            device="npu",
            provider="VitisAI",
            package="AMD's Ryzen AI software (Windows)",
        ),
        form=_VITISAI_FORM,
        window=64,
        context_length=NPU_CONTEXT,
        quantize=VITISAI_RULES,
        measured_kld=KLD_OF_32_THROUGHOUT,
    ),
    "webgpu": Target(
        name="webgpu",
        accelerator=Stage(
            names.MODEL,
            execution_provider="WebGpuExecutionProvider",
            device="gpu",
            provider="WebGPU",
            package="onnxruntime-ep-webgpu",
            plugin="onnxruntime_ep_webgpu",
            session_options=_KEPT_ON_CPU,
        ),
        form=_WEBGPU_FORM,
        window=0,
        context_length=LONG_CONTEXT,
        quantize=BLOCKS_OF_32,
        measured_kld=KLD_OF_32_THROUGHOUT,
        profiles=_WEBGPU_PROFILES,
    ),
}
