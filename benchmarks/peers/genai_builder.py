"""onnxruntime-genai's model builder, in an environment of its own: it wants torch and a newer transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from benchmarks.peers.tool import Cost, own_python, run_tool

VERSION: Final = "0.18.0"
_PACKAGES: Final = (
    f"onnxruntime-genai=={VERSION}",
    "onnxruntime==1.32.0",
    "torch==2.13.0",
    "transformers==5.24.0",
    "onnx==1.23.2",
    "onnx-ir==1.1.0",
)
# What `--extra_options algo_config=` takes, by the name of the row. All else is as the builder has it: block 32,
# symmetric, accuracy_level 4, the embedding float32.
ALGORITHMS: Final = {
    "genai default": "default",
    "genai rtn": "rtn",
    "genai k_quant": "k_quant",
    "genai k_quant_mixed": "k_quant_mixed",
}


def builder_python(folder: Path) -> Path:
    """The Python of the environment, made in `folder` the first time. Raises PeerError if it cannot be."""
    return own_python(folder, f"genai-{VERSION}", _PACKAGES)


def build(python: Path, checkpoint: Path, algorithm: str, out: Path) -> Cost:
    """An int4 model for the CPU from a local folder; the time is the whole process, Python and torch included."""
    out.mkdir(parents=True, exist_ok=True)
    command = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(out)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(out.parent / "cache")]
    command += ["--extra_options", f"algo_config={algorithm}"]
    log = out.with_name(out.name + ".log")
    return run_tool(command, log, {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"})
