"""Which execution providers this machine has, built into ONNX Runtime or as plugins that find their device."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any, Final

import onnxruntime as ort

from toolkit.target import TARGETS, Stage

# The execution provider behind genai's name for it, and the package that carries it as a plugin.
_PROVIDERS: Final = {
    str(target.accelerator.provider).lower(): target.accelerator
    for target in TARGETS.values()
    if target.accelerator.provider
}


# Asked before any plugin is registered: onnxruntime then lists that as available too, device or not.
_BUILT_IN: Final = frozenset(ort.get_available_providers())


def provider_is_here(name: str) -> bool:
    """Returns whether onnxruntime has a provider of genai's `name` built in, or as a plugin that finds its device.

    Without the device a plugin is a compiler or a simulator, and would leave the nodes to the CPU without a word. A
    GPU's names the CPU as its device only where its user has asked for a GPU in software.
    """
    execution_provider, row = _execution_provider(name), _PROVIDERS.get(name.lower())
    if execution_provider in _BUILT_IN:
        return True
    if name.lower() == "dml" and _genai_has_dml():
        return True
    if row is None or not row.plugin:
        return False
    try:
        if not _devices(execution_provider):
            _make_known(row.plugin, execution_provider)
    except Exception:  # a package that is not here or broken, or whatever the runtime throws
        return False
    found = _devices(execution_provider)
    return bool(found if row.device == "gpu" else found - {ort.OrtHardwareDeviceType.CPU})


@functools.cache
def _make_known(plugin: str, execution_provider: str) -> None:
    """Registers a plugin once: it stays registered where it finds no device, and ONNX Runtime takes it no second
    time."""
    library = importlib.import_module(plugin).get_library_path()
    ort.register_execution_provider_library(execution_provider, str(library))


def _genai_has_dml() -> bool:
    """Builds of onnxruntime-genai with DirectML bring an ONNX Runtime of their own, which `onnxruntime` is not."""
    try:
        import onnxruntime_genai as og
    except ImportError:
        return False
    return bool(og.is_dml_available())


def providers() -> tuple[Stage, ...]:
    """Returns every execution provider that a target is for besides the CPU's, as its target's row has it."""
    return tuple(_PROVIDERS.values())


def missing_provider(name: str) -> str:
    """Returns what to say of an execution provider this machine lacks."""
    row = _PROVIDERS.get(name.lower())
    what = f"this machine has no {_execution_provider(name)} with its device, which the bundle is made for"
    on_cpu = "run every stage on the CPU with --on-cpu"
    if row is None or not row.package:
        return f"{what}: {on_cpu}"
    if row.plugin and importlib.util.find_spec(row.plugin):
        return f"{what}: {row.package} is installed and finds none, see to its driver, or {on_cpu}"
    return f"{what}: install {row.package}, or {on_cpu}"


def _execution_provider(name: str) -> str:
    row = _PROVIDERS.get(name.lower())
    return row.execution_provider if row else f"{name}ExecutionProvider"


def make_known_to_genai(og: Any, name: str) -> bool:
    """Returns whether a provider is here, and makes a plugin known to onnxruntime-genai, whose module is `og`."""
    if not provider_is_here(name):
        return False
    row = _PROVIDERS.get(name.lower())
    if row and row.plugin and row.execution_provider not in _BUILT_IN:
        _make_known_there(og, row.plugin, row.execution_provider)
    return True


@functools.cache
def _make_known_there(og: Any, plugin: str, execution_provider: str) -> None:
    """Registers a plugin with onnxruntime-genai once: it refuses a second bundle's."""
    library = importlib.import_module(plugin).get_library_path()
    og.register_execution_provider_library(execution_provider, str(library))


def _devices(execution_provider: str) -> set[Any]:
    """The kinds of device a registered plugin has found."""
    return {found.device.type for found in ort.get_ep_devices() if found.ep_name == execution_provider}
