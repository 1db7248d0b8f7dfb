"""Target webgpu: its form beside the reference, its profiles, and what is said where no plugin or no GPU is."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import onnxruntime as ort
import pytest
from onnxruntime import OrtHardwareDeviceType

from tests.exports import Exports
from tests.graphs import EIGHT_BITS, write_graphs
from tests.prompts import prompt_of, reference_tokens
from toolkit import names
from toolkit.bundle.settings import read_genai_config
from toolkit.errors import MachineError
from toolkit.evaluate import providers, session
from toolkit.evaluate.positions import open_positions
from toolkit.graph.interface import read_interface
from toolkit.target import Target


def test_float16_on_the_cpu_chooses_the_reference_s_tokens(
    tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exact model's greedy tokens, by a prompt and by the cache, where float16 is all that is not exact."""
    monkeypatch.setattr(Target, "in_precision", lambda row, precision: row)
    write_graphs(tiny_r1, tmp_path, "webgpu")
    inputs = read_interface(tmp_path / "model.onnx").inputs
    assert {value.dtype for name, value in inputs.items() if names.is_past(name)} == {"FLOAT16"}
    bundle = open_positions(tmp_path)
    prompts = [prompt_of(length) for length in (1, 9, 40)]
    for prompt, tokens in zip(prompts, reference_tokens(tiny_r1, prompts, 24), strict=True):
        logits = bundle.logits([*prompt, *tokens], len(prompt))
        chosen = logits[len(prompt) - 1 : -1].argmax(axis=-1)
        assert chosen.tolist() == tokens


@pytest.mark.parametrize(
    ("profile", "outside"), [("gpu-head", []), ("cpu-head", ["Cast", "GatherBlockQuantized", "MatMulNBits"])]
)
def test_a_profile_says_where_embedding_and_head_run(profile: str, outside: list[str], exports: Exports) -> None:
    """Their nodes are marked for the CPU, or none of them; what computes lengths always is."""
    bundle = exports("webgpu", (f"profile={profile}", *EIGHT_BITS))
    marked = [node for node in read_interface(bundle / "model.onnx").nodes if node.annotation]
    lengths = [node for node in marked if node.name.startswith(names.LENGTHS_PATH)]
    assert len(lengths) == 11 and {node.annotation for node in marked} == {names.OUTSIDE_ANNOTATION}
    assert sorted({node.operator.split(":")[-1] for node in marked if node not in lengths}) == outside
    options = read_genai_config(bundle)["model"]["decoder"]["session_options"]
    assert options["provider_options"] == [{"WebGPU": {}}]
    assert options["session.layer_assignment_settings"] == f"CPUExecutionProvider(={names.OUTSIDE_ANNOTATION})"


def _plugin(monkeypatch: pytest.MonkeyPatch, kinds: list[OrtHardwareDeviceType], name: str) -> None:
    """A plugin of this name that is installed, and finds devices of these kinds."""
    module = ModuleType(name)
    module.get_library_path = lambda: "library"
    module.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda name, path: None)
    monkeypatch.setattr(providers, "_devices", lambda execution_provider: set(kinds))


CPU, GPU = OrtHardwareDeviceType.CPU, OrtHardwareDeviceType.GPU


@pytest.mark.parametrize(
    ("provider", "kinds", "here"),
    [("WebGPU", [], False), ("WebGPU", [GPU], True), ("WebGPU", [CPU], True), ("qnn", [CPU], False)],
)
def test_a_plugin_is_here_with_its_device(
    provider: str, kinds: list[OrtHardwareDeviceType], here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WebGPU's names the CPU only where its user has asked for a GPU in software; QNN's always does."""
    row = next(row for row in providers.providers() if row.provider == provider)
    _plugin(monkeypatch, kinds, row.plugin)
    assert providers.provider_is_here(provider) is here


def test_a_plugin_without_a_device_is_one_line(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has installed the plugin is not told to install it."""
    _plugin(monkeypatch, [], "onnxruntime_ep_webgpu")
    with pytest.raises(MachineError) as refused:
        session.open_model(exports("webgpu"))
    line = str(refused.value)
    assert "onnxruntime-ep-webgpu is installed and finds none, see to its driver" in line
    assert "--on-cpu" in line and "\n" not in line and "install onnx" not in line


def test_a_plugin_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime refuses a library under a name it has, also where it found no device."""
    row = next(row for row in providers.providers() if row.provider == "WebGPU")
    _plugin(monkeypatch, [], row.plugin)
    registered: list[str] = []
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda name, path: registered.append(name))
    providers._make_known.cache_clear()
    assert [providers.provider_is_here("WebGPU") for _ in range(3)] == [False] * 3
    assert registered == [row.execution_provider]
    providers._make_known.cache_clear()


def test_a_plugin_is_made_known_to_genai_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second bundle of the same process finds it there: onnxruntime-genai refuses a library that it has."""
    known, genai = list[str](), ModuleType("genai")
    genai.register_execution_provider_library = lambda name, library: known.append(name)
    _plugin(monkeypatch, [OrtHardwareDeviceType.GPU], "onnxruntime_ep_webgpu")
    assert [providers.make_known_to_genai(genai, "WebGPU") for _ in range(2)] == [True, True]
    assert known == ["WebGpuExecutionProvider"]
