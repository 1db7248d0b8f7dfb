"""llama.cpp's quantizer, built from the sources that the llama-cpp-python package carries."""

from __future__ import annotations

import os
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.peers.tool import Cost, PeerError, program, run_tool

VERSION: Final = "0.3.36"
_JOBS: Final = 2
_OPTIONS: Final = {
    "CMAKE_BUILD_TYPE": "Release", "BUILD_SHARED_LIBS": "OFF", "LLAMA_BUILD_SERVER": "OFF", "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_TESTS": "OFF", "LLAMA_BUILD_EXAMPLES": "OFF", "LLAMA_OPENSSL": "OFF", "GGML_OPENMP": "OFF",
}  # fmt: skip


@dataclass(frozen=True)
class LlamaType:
    """One of llama-quantize's types, with an importance matrix or without."""

    type: str
    imatrix: bool = False


LLAMA_TYPES: Final = {
    "q4_0": LlamaType("Q4_0"),
    "q4_k_m": LlamaType("Q4_K_M"),
    "q4_k_m+imatrix": LlamaType("Q4_K_M", imatrix=True),
    "iq4_xs+imatrix": LlamaType("IQ4_XS", imatrix=True),
    "q6_k": LlamaType("Q6_K"),
}


def llama_quantize(folder: Path) -> Path:
    """The program, built in `folder` the first time (seven minutes of one core). Raises PeerError if it cannot be."""
    made = folder / f"llama.cpp-{VERSION}" / "bin" / ("llama-quantize.exe" if os.name == "nt" else "llama-quantize")
    if made.is_file():
        return made
    cmake = program("cmake")
    if cmake is None:
        raise PeerError("cmake is not here, llama-quantize is built with it: pip install cmake ninja")
    source, build = _sources(folder), folder / f"llama.cpp-{VERSION}.partial"
    generator = ["-G", "Ninja"] if program("ninja") else []
    options = [f"-D{key}={value}" for key, value in _OPTIONS.items()]
    run_tool([cmake, "-S", str(source), "-B", str(build), *generator, *options], folder / "cmake.log")
    target = ["--config", "Release", "--target", "llama-quantize", "--parallel", str(_JOBS)]
    run_tool([cmake, "--build", str(build), *target], folder / "build.log")
    built = next((path for path in sorted(build.rglob(made.name)) if path.is_file()), None)
    if built is None:
        raise PeerError(f"{build} has no {made.name} after the build ({folder / 'build.log'})")
    made.parent.mkdir(parents=True)
    built.replace(made)
    return made


def quantize(tool: Path, source: Path, kind: LlamaType, imatrix: Path | None, out: Path) -> Cost:
    """`source` to `out`, by llama.cpp's own choice of a type for each tensor."""
    calibrated = ["--imatrix", str(imatrix)] if kind.imatrix else []
    threads = str(os.cpu_count() or 1)
    return run_tool([str(tool), *calibrated, str(source), str(out), kind.type, threads], out.with_suffix(".log"))


def _sources(folder: Path) -> Path:
    """llama.cpp's folder out of the source package."""
    inside = f"llama_cpp_python-{VERSION}/vendor/llama.cpp"
    if not (folder / inside / "CMakeLists.txt").is_file():
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
        run_tool([*download, f"llama-cpp-python=={VERSION}"], folder / "download.log")
        with tarfile.open(folder / f"llama_cpp_python-{VERSION}.tar.gz") as package:
            members = [member for member in package if member.name.startswith(inside + "/")]
            package.extractall(folder, members, filter="data")
    return folder / inside
