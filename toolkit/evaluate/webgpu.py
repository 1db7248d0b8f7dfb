"""One graph in onnxruntime-ep-webgpu beside ORT's CPU kernels: on a GPU, or else in software that a browser brings.

SwiftShader, the software Vulkan that Chromium brings, computes no float16, and reads prompts of many rows
wrongly; so the graph is run in float32 there, on a few tokens. Nothing here knows whether it is fast.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from toolkit import names
from toolkit.errors import MachineError
from toolkit.evaluate.positions import exact_graph
from toolkit.target import CPU_EP, TARGETS

PROVIDER: Final = TARGETS["webgpu"].accelerator.execution_provider
# The plugin's own word for a software adapter, without which it offers a machine without a GPU nothing.
_SOFTWARE: Final = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"
# Where browsers keep a Vulkan loader and SwiftShader.
BROWSERS: Final = ("/usr/lib/chromium", "/usr/lib64/chromium", "/opt/google/chrome", "/opt/chromium.org/chromium")
_LOADER: Final = "libvulkan.so.1"
DRIVER: Final = "vk_swiftshader_icd.json"
_PROMPT: Final = 8
_Values = dict[str, NDArray[Any]]


def run_graph(bundle: Path) -> tuple[float, dict[str, int], str]:
    """Runs a prompt and the token after it in both.

    Returns the larger rms difference of the logits over their standard deviation, the nodes by the execution provider
    that took them, without those that the bundle keeps on the CPU, and what is to be said of the device. Raises
    MachineError where there is no adapter, and what ONNX Runtime raises.
    """
    device, said = _device()
    model = exact_graph(bundle, names.MODEL)
    reference = ort.InferenceSession(_in_float32(model).SerializeToString(), _options(bundle), providers=[CPU_EP])
    try:
        session = _opened(model, bundle, device)
        error = _difference(session, reference)
    except Exception as problem:  # onnxruntime's errors have no common root short of Exception
        if "adapter" in str(problem):
            raise MachineError("no GPU and no Vulkan in software: install a driver, or Chromium") from None
        if "requires f16" not in str(problem):
            raise
        said = f"{said} without float16, in float32"
        session = _opened(_in_float32(model), bundle, device)
        error = _difference(session, reference)
    return error, _placed(session, model), said


def _device() -> tuple[Any, str]:
    """The plugin's device, a GPU before any other, and its name."""
    os.environ.setdefault(_SOFTWARE, "1")
    plugin = importlib.import_module(TARGETS["webgpu"].accelerator.plugin)
    ort.register_execution_provider_library(PROVIDER, str(plugin.get_library_path()))
    found = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    gpus = [device for device in found if device.device.type != ort.OrtHardwareDeviceType.CPU]
    if gpus:
        return gpus[0], f"on a GPU of {gpus[0].device.vendor or 'its vendor'}"
    _use_a_browsers_vulkan()
    return found[0], "in software"


def _use_a_browsers_vulkan() -> None:
    """Lets the plugin find the loader and the driver of an installed browser, unless a driver is named already."""
    for folder in map(Path, BROWSERS):
        if (folder / _LOADER).is_file() and (folder / DRIVER).is_file():
            ctypes.CDLL(str(folder / _LOADER), mode=ctypes.RTLD_GLOBAL)
            os.environ.setdefault("VK_DRIVER_FILES", str(folder / DRIVER))
            return


def _options(bundle: Path) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    (stage,) = TARGETS["webgpu"].stages(0)
    recorded = {"session.record_ep_graph_assignment_info": "1"}
    place = {"session.model_external_initializers_file_folder_path": str(bundle)}
    for key, value in {**stage.session_options, **recorded, **place}.items():
        options.add_session_config_entry(key, value)
    return options


def _opened(model: onnx.ModelProto, bundle: Path, device: Any) -> ort.InferenceSession:
    options = _options(bundle)
    options.add_provider_for_devices([device], {})
    return ort.InferenceSession(model.SerializeToString(), options)


def _in_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with every float16 widened: weights, casts, inputs and outputs."""
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type == half:
            wide = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
    for value in (*copy.graph.input, *copy.graph.output):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = single
    for node in copy.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == half:
                attribute.i = single
    return copy


def _difference(session: ort.InferenceSession, reference: ort.InferenceSession) -> float:
    """The larger error of a prompt and of the token after it, which both sides read with the reference's cache."""
    vocab_size = int(session.get_outputs()[0].shape[-1])
    ids = np.random.default_rng(0).integers(0, vocab_size, (1, _PROMPT + 1))
    kinds = {value.name: value.type for value in session.get_inputs()}
    cache: _Values = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in reference.get_inputs()
        if names.is_past(value.name)
    }
    errors = []
    for start, stop in ((0, _PROMPT), (_PROMPT, _PROMPT + 1)):
        tokens = {names.INPUT_IDS: ids[:, start:stop], names.ATTENTION_MASK: np.ones((1, stop), np.int64)}
        expected = _run(reference, {**tokens, **cache})
        made = _run(session, {**tokens, **dict(_as_taken(cache, kinds))})
        logits = expected[names.LOGITS]
        errors.append(float(np.sqrt(((made[names.LOGITS] - logits) ** 2).mean()) / logits.std()))
        cache = {name: expected[names.present_of(name)] for name in cache}
    return max(errors)


def _as_taken(cache: _Values, kinds: dict[str, str]) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, array in cache.items():
        yield name, array.astype(np.float16 if kinds[name] == "tensor(float16)" else np.float32)


def _run(session: ort.InferenceSession, feeds: _Values) -> _Values:
    made = session.run(None, feeds)
    return {value.name: np.asarray(array) for value, array in zip(session.get_outputs(), made, strict=True)}


def _placed(session: ort.InferenceSession, model: onnx.ModelProto) -> dict[str, int]:
    marked = {node.name for node in model.graph.node if node.metadata_props}
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += sum(node.name not in marked for node in part.get_nodes())
    return {provider: count for provider, count in counts.items() if count}
