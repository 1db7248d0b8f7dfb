"""Sessions of onnxruntime-qnn: its compiler for the Hexagon NPU (HTP), and its simulator, on x86-64 Linux."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from toolkit.errors import MachineError

PROVIDER: Final = "QNNExecutionProvider"
PACKAGE: Final = "onnxruntime-qnn"
# Measured with ONNX Runtime 1.32: 2.3.0 opens no session, 2.5.0 leaves nodes to the CPU, 2.6.0 and 2.7.0 agree.
_OLDEST: Final = (2, 6)
# Attention is left to the CPU unless the compiler is told otherwise.
_AFFINITY: Final = {"op_type": {"GroupQueryAttention": "htp"}}


def htp_version() -> str:
    """Returns the version of the installed compiler. Raises MachineError where there is none, or one that is known to
    be wrong."""
    if sys.platform != "linux" or platform.machine().lower() not in ("x86_64", "amd64"):
        here = f"{platform.system()} {platform.machine()}"
        raise MachineError(f"{PACKAGE} compiles for HTP on x86-64 Linux, this is {here}")
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise MachineError(f"{PACKAGE} is not installed: pip install {PACKAGE}") from None
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise MachineError(f"{PACKAGE} {version} is known to be wrong: pip install '{PACKAGE}>={oldest}'")
    return version


def plugin_library() -> str:
    """Returns the execution provider's library, for who registers it elsewhere than in ONNX Runtime."""
    import onnxruntime_qnn as qnn

    return str(qnn.get_library_path())


def simulator_options(provider_options: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Returns a bundle's options for its device as they are here, where the compiler and the simulator are; `folder` is
    for a file that is read when a graph is compiled."""
    import onnxruntime_qnn as qnn

    affinity = folder / "op_affinity.json"
    affinity.write_text(json.dumps(_AFFINITY), encoding="utf-8")
    here = {"backend_path": qnn.get_qnn_htp_path(), "op_affinity": str(affinity)}
    return {"htp_graph_finalization_optimization_mode": "3", **provider_options, **here}


def open_htp(graph: Path, provider_options: Mapping[str, str], entries: Mapping[str, str], folder: Path) -> Any:
    """Returns an InferenceSession of `graph`, compiled for HTP with no node left to the CPU; it runs in the simulator.

    `provider_options` say for which SoC, `entries` are session options; `folder` is for a file the compiler reads.
    Call it in a process of its own: native code of vendors may crash.
    """
    import onnxruntime as ort

    if all(device.ep_name != PROVIDER for device in ort.get_ep_devices()):
        ort.register_execution_provider_library(PROVIDER, plugin_library())
    options = ort.SessionOptions()
    options.log_severity_level = 3
    devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    options.add_provider_for_devices(devices, simulator_options(provider_options, folder))
    for key, value in {"session.disable_cpu_ep_fallback": "1", **entries}.items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(str(graph), options)
