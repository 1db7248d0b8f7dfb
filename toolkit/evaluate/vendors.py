"""A bundle's accelerator stages in their vendor's own software, where it can be installed, beside ORT's CPU kernels.

`openvino` loads and runs the stages on its CPU device; `onnxruntime-qnn` compiles them for HTP with fallback to the CPU
disabled and runs them in its simulator; `onnxruntime-ep-webgpu` runs a bundle's one graph on a GPU, or in a browser's
software. Native code of vendors may crash, so it runs in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.apart import ChildFailed, answer, run_apart
from toolkit.bundle.settings import read_settings
from toolkit.epcontext.htp import open_htp
from toolkit.errors import BundleError, MachineError
from toolkit.evaluate import webgpu
from toolkit.evaluate.positions import Pipeline, placement, some_ids
from toolkit.target import TARGETS
from toolkit.typed_json import Json, from_json, to_json

# The package behind an execution provider that can be tried without its device.
PACKAGES: Final = {
    "OpenVINOExecutionProvider": "openvino",
    "QNNExecutionProvider": "onnxruntime-qnn",
    webgpu.PROVIDER: TARGETS["webgpu"].accelerator.package,
}
# float16 over a few layers, against the spread of the hidden states; a wrong mask or position costs far more.
MAX_ERROR: Final = 0.02
_Values = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class VendorRun:
    """One stage in its vendor's software. `error` is the rms difference of the hidden states, or of one graph's logits,
    from ORT's CPU kernels, over their standard deviation; `nodes` by execution provider where ORT placed them."""

    file: str
    software: str
    error: float
    nodes: dict[str, int]


@dataclass(frozen=True)
class VendorJob:
    """What the process with the vendor's software is told: a bundle, and whose stages of it to run."""

    bundle: str
    execution_provider: str


@dataclass(frozen=True)
class VendorRuns:
    """What it answers: a run of each accelerator stage."""

    runs: tuple[VendorRun, ...]


def run_vendor_apart(bundle: Path, execution_provider: str) -> list[VendorRun]:
    """Runs each accelerator stage of a pipeline in a process of its own.

    Raises MachineError if the package is missing or there is none for this provider, BundleError for what the vendor's
    software would not take.
    """
    package = PACKAGES.get(execution_provider)
    if package is None:
        raise MachineError(f"{execution_provider} cannot be run here: its vendor has no software for other machines")
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise MachineError(f"{package} is not installed: pip install {package}") from None
    job = VendorJob(str(bundle), execution_provider)
    try:
        made = from_json(VendorRuns, run_apart("toolkit.evaluate.vendors", job), "what the vendor's software made")
    except ChildFailed as failed:
        raise BundleError(f"{package} did not run the stages of {bundle}: {failed.reason}") from None
    return list(made.runs)


def _run(raw: Json) -> Json:
    """In the child: both stages on one window of ids and the token after it, in turn with ORT."""
    job = from_json(VendorJob, raw, "the job")
    bundle, execution_provider = Path(job.bundle), job.execution_provider
    if execution_provider == webgpu.PROVIDER:
        return to_json(VendorRuns((_webgpu(bundle),)))
    vendor = _openvino if execution_provider == "OpenVINOExecutionProvider" else _qnn
    software = _software(execution_provider)
    runs, ids = [], some_ids(bundle, 1)
    for run, _ in Pipeline(bundle, exact=True).stage_runs(ids, len(ids) - 1):
        file = names.stage_file(run.stage)
        made, nodes = vendor(bundle / file, run.feeds, run.output)
        reference = run.hidden.astype(np.float64)
        rms = float(np.sqrt(((made.astype(np.float64) - reference) ** 2).mean()))
        runs.append(VendorRun(file, software, rms / float(reference.std()), nodes))
    return to_json(VendorRuns(tuple(runs)))


def _software(execution_provider: str) -> str:
    package = PACKAGES[execution_provider]
    return f"{package} {importlib.metadata.version(package)}"


def _webgpu(bundle: Path) -> VendorRun:
    error, nodes, said = webgpu.run_graph(bundle)
    return VendorRun(names.stage_file(names.MODEL), f"{_software(webgpu.PROVIDER)} {said}", error, nodes)


def _openvino(path: Path, feeds: _Values, output: str) -> tuple[NDArray[Any], dict[str, int]]:
    import openvino

    core = openvino.Core()
    # By default its CPU device rounds activations to int8 before 4-bit products, as ORT does at accuracy_level 4.
    exact = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(path), "CPU", exact)
    taken = {name for value in compiled.inputs for name in value.get_names()}
    made = compiled({name: array for name, array in feeds.items() if name in taken})
    return np.asarray(made[output]), {}


def _qnn(path: Path, feeds: _Values, output: str) -> tuple[NDArray[Any], dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        entries = {"session.record_ep_graph_assignment_info": "1"}
        session = open_htp(path, read_settings(path.parent).soc_options(), entries, Path(folder))
        (made,) = session.run([output], feeds)
    return np.asarray(made), placement(session)


if __name__ == "__main__":
    answer(_run)
