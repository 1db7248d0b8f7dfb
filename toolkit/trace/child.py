"""Traces a decoder of transformers by torch's exporter, in a process of its own; see `traced.py` for who asks.

No weight is read or held: parameters are fake tensors, which have a shape and no numbers. What the module computes when
it is made, such as RoPE's frequencies, stands in the graph. B batch, S query length, P past length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import no_init_weights

from toolkit import names
from toolkit.apart import answer
from toolkit.trace.traced import CACHE_LESS, TracedFacts, TraceJob
from toolkit.typed_json import from_json

_OPSET: Final = 23
# Any sizes that differ from each other, and from 0 and 1, which the exporter would take for constants.
_B, _S, _P = 2, 3, 5
# Before what a checkpoint calls a parameter.
_WRAPPED: Final = "decoder."


class _Step(torch.nn.Module):
    """A decoder as onnxruntime-genai calls it: the cache is a list of pairs, one a layer."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: Any
    ) -> Any:
        """Logits [B, S, V], then the key and the value of each layer, [B, heads, P + S, width]."""
        cache = DynamicCache.from_legacy_cache(tuple(past))
        made = self.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return made.logits, [tuple(pair) for pair in made.past_key_values.to_legacy_cache()]


def trace(given: Any) -> TracedFacts:
    """Writes the graph of a checkpoint's decoder to the job's file, and returns what its parameters are called."""
    job = from_json(TraceJob, given, "job")
    config = transformers.AutoConfig.from_pretrained(job.folder, trust_remote_code=False, local_files_only=True)
    if config.is_encoder_decoder:
        raise ValueError(CACHE_LESS)
    computed = _buffers(config)
    with FakeTensorMode():
        decoder = _decoder(config)
        shapes = _cache_shapes(decoder)
        model = _exported(decoder, shapes)
    aliases = _aliases(decoder)
    parameters = _without_weights(model, aliases, computed)
    model = _simplified(model)
    ir.save(model, job.graph)
    return TracedFacts(parameters, {name: aliases[name] for name in parameters})


def _decoder(config: Any) -> torch.nn.Module:
    """The module in float32, attention in plain operators."""
    # Without a dtype of their own modules are made in torch's default, whatever the config says.
    config.torch_dtype = torch.float32
    decoders: Any = transformers.AutoModelForCausalLM
    made: torch.nn.Module = decoders.from_config(config, attn_implementation="eager", trust_remote_code=False)
    return made.eval()


def _buffers(config: Any) -> dict[str, torch.Tensor]:
    """What a module computes when it is made, by name; its parameters have no numbers and take no memory."""
    with no_init_weights(), _parameters_without_numbers():
        return {name: buffer.detach() for name, buffer in _decoder(config).named_buffers()}


@contextlib.contextmanager
def _parameters_without_numbers() -> Iterator[None]:
    """Every parameter that a module is given meanwhile becomes one of the meta device; buffers stay."""
    register = torch.nn.Module.register_parameter

    def without_numbers(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = torch.nn.Parameter(param.detach().to("meta"), requires_grad=False)
        register(self, name, param)

    torch.nn.Module.register_parameter = without_numbers  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _cache_shapes(decoder: torch.nn.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The heads and the width of each layer's key and value, from one run without a cache."""
    ids = torch.zeros(_B, _S, dtype=torch.int64)
    with torch.no_grad():
        made = decoder(input_ids=ids, use_cache=True)
    cache = getattr(made, "past_key_values", None)
    if cache is None or not hasattr(cache, "to_legacy_cache"):
        raise ValueError(CACHE_LESS)
    pairs = cache.to_legacy_cache()
    if not pairs or any(x is None or x.dim() != 4 or x.shape[2] != _S for pair in pairs for x in pair):
        raise ValueError(CACHE_LESS)
    return [((k.shape[1], k.shape[3]), (v.shape[1], v.shape[3])) for k, v in pairs]


def _exported(decoder: torch.nn.Module, shapes: list[tuple[tuple[int, int], tuple[int, int]]]) -> ir.Model:
    """The graph with its inputs and outputs under onnxruntime-genai's names, parameters fake."""
    past = [tuple(torch.zeros(_B, heads, _P, width) for heads, width in pair) for pair in shapes]
    any_size = torch.export.Dim.DYNAMIC
    # Two tensors: of one and the same the exporter would make one input.
    ids, positions = (torch.zeros(_B, _S, dtype=torch.int64) for _ in range(2))
    program = torch.onnx.export(
        _Step(decoder).eval(),
        (ids, torch.ones(_B, _P + _S, dtype=torch.int64), positions, past),
        dynamo=True,
        optimize=False,
        verbose=False,
        opset_version=_OPSET,
        dynamic_shapes=(
            {0: any_size, 1: any_size},
            {0: any_size, 1: any_size},
            {0: any_size, 1: any_size},
            [({0: any_size, 2: any_size},) * 2] * len(past),
        ),
    )
    assert program is not None
    model: ir.Model = program.model
    inputs = [names.INPUT_IDS, names.ATTENTION_MASK, names.POSITION_IDS]
    outputs = [names.LOGITS]
    for layer in range(len(past)):
        inputs += [names.past_key(layer), names.past_value(layer)]
        outputs += [names.present_key(layer), names.present_value(layer)]
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = name
    return model


def _aliases(decoder: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    """What else a checkpoint may call each parameter and lasting buffer: tied ones have several names, and those of a
    base model lack its prefix."""
    lasting = decoder.state_dict(keep_vars=True)
    base = f"{getattr(decoder, 'base_model_prefix', '')}."
    found = {}
    for name, tensor in lasting.items():
        tied = [other for other, its in lasting.items() if its is tensor and other != name]
        found[name] = tuple([*tied, *(one.removeprefix(base) for one in [name, *tied] if one.startswith(base))])
    return found


def _without_weights(
    model: ir.Model, lasting: Mapping[str, tuple[str, ...]], computed: Mapping[str, torch.Tensor]
) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the checkpoint that the graph reads: it becomes a name without numbers there, and
    what was computed becomes a constant."""
    found = {}
    for name, value in list(model.graph.initializers.items()):
        own = name.removeprefix(_WRAPPED)
        tensor = value.const_value
        assert tensor is not None
        shape = tuple(dim for dim in tensor.shape if isinstance(dim, int))
        if not value.uses():
            del model.graph.initializers[name]
        elif own in lasting:
            model.graph.initializers.pop(name)
            value.name = own
            value.const_value = ir.ExternalTensor(
                names.MODEL_DATA_FILE, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(shape), name=own
            )
            model.graph.initializers[own] = value
            found[own] = shape
        elif own in computed:
            value.const_value = ir.tensor(computed[own].numpy(), name=name)
        elif isinstance(getattr(tensor, "raw", None), FakeTensor):
            raise ValueError(f"the value of {name} is not known without running the model")
    return found


def _simplified(model: ir.Model) -> ir.Model:
    """The same graph with constants as initializers, and without what does nothing."""
    ir.passes.Sequential(
        passes.InlinePass(),
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.RemoveUnusedNodesPass(),
        passes.ClearMetadataAndDocStringPass(),
    )(model)
    return model


if __name__ == "__main__":
    answer(trace)
