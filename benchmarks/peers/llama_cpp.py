"""llama.cpp, built from the sources that the llama-cpp-python package carries: its quantizer, logits, answers, speed.

T tokens, V vocab.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.tool import Cost, PeerError, program, run_tool

VERSION: Final = "0.3.36"
_JOBS: Final = 2
_PROGRAMS: Final = ("llama-quantize", "llama-logits", "llama-bench", "llama-completion", "llama-speculative-simple")
_OURS: Final = Path(__file__).parent / "llama_logits"
# So many questions are answered side by side: each pass reads the weights once for all of them.
_SEQUENCES: Final = 16
_OPTIONS: Final = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_COMMON": "ON",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "ON",
    "LLAMA_OPENSSL": "OFF",
    "GGML_OPENMP": "OFF",
}


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
    "q5_k_m": LlamaType("Q5_K_M"),
    "q6_k": LlamaType("Q6_K"),
}


@dataclass(frozen=True)
class LlamaCpp:
    """The paths of llama.cpp's quantizer, of the program that runs a file, of its own benchmark, of the one that
    continues a text, and of its example in which a small model drafts for a large one."""

    quantizer: Path
    runner: Path
    bench: Path
    completion: Path
    speculative: Path


def llama_cpp(folder: Path) -> LlamaCpp:
    """The programs, built in `folder` the first time (six minutes of one core). Raises PeerError if they cannot be."""
    sources = b"".join(path.read_bytes() for path in sorted(_OURS.iterdir()))
    ours = hashlib.sha256(sources + repr((_PROGRAMS, _OPTIONS)).encode()).hexdigest()[:8]
    suffix, made = ".exe" if os.name == "nt" else "", folder / f"llama.cpp-{VERSION}-{ours}"
    tools = LlamaCpp(*(made / f"{name}{suffix}" for name in _PROGRAMS))
    if made.is_dir():
        return tools
    cmake = program("cmake")
    if cmake is None:
        raise PeerError("cmake is not here, llama.cpp is built with it: pip install cmake ninja")
    build = folder / f"llama.cpp-{VERSION}.build"
    options = [
        f"-D{key}={value}" for key, value in {**_OPTIONS, "LLAMA_CPP": _sources(folder).resolve().as_posix()}.items()
    ]
    ninja = program("ninja")
    # By its path: cmake looks on PATH alone, where an environment that is not activated has nothing.
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={Path(ninja).as_posix()}"] if ninja else []
    run_tool([cmake, "-S", str(_OURS), "-B", str(build), *generator, *options], folder / "cmake.log")
    targets = ["--config", "Release", "--parallel", str(_JOBS), "--target", *_PROGRAMS]
    run_tool([cmake, "--build", str(build), *targets], folder / "build.log")
    partial = made.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    for tool in (tools.quantizer, tools.runner, tools.bench, tools.completion, tools.speculative):
        built = next((path for path in sorted(build.rglob(tool.name)) if path.is_file()), None)
        if built is None:
            raise PeerError(f"{build} has no {tool.name} after the build ({folder / 'build.log'})")
        built.replace(partial / tool.name)
    partial.rename(made)
    return tools


def quantize(tools: LlamaCpp, source: Path, kind: LlamaType, imatrix: Path | None, out: Path) -> Cost:
    """`source` to `out`, by llama.cpp's own choice of a type for each tensor."""
    calibrated = ["--imatrix", str(imatrix)] if imatrix else []
    threads = str(os.cpu_count() or 1)
    return run_tool([str(tools.quantizer), *calibrated, str(source), str(out), kind.type, threads], _log(out))


class LlamaLogits:
    """A GGUF file as llama.cpp runs it on the CPU, activations rounded to int8 and the cache to float16."""

    def __init__(self, process: subprocess.Popen[bytes], vocab_size: int, log: Path) -> None:
        self._process, self._vocab_size, self._log = process, vocab_size, log

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """[T, V] of every position of one sequence. Raises PeerError if llama.cpp gives up."""
        source, answer = self._process.stdin, self._process.stdout
        assert source and answer
        nbytes = 4 * len(ids) * self._vocab_size
        try:
            source.write(np.array([len(ids), *ids], "<i4").tobytes())
            source.flush()
            made = answer.read(nbytes)
        except OSError:
            made = b""
        if len(made) < nbytes:
            raise PeerError(f"llama.cpp does not run it: exit code {self._process.wait()} ({self._log})")
        return np.frombuffer(made, "<f4").reshape(len(ids), self._vocab_size)


@contextmanager
def open_logits(tools: LlamaCpp, path: Path, vocab_size: int, max_tokens: int) -> Iterator[LlamaLogits]:
    """llama.cpp with a file open, for sequences of at most `max_tokens`."""
    command, log = [str(tools.runner), "logits", str(path), str(max_tokens)], path.with_suffix(".run.log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output)
        try:
            yield LlamaLogits(process, vocab_size, log)
        finally:
            process.kill()
            process.communicate()


def answers(
    tools: LlamaCpp, path: Path, prompts: Sequence[list[int]], new_tokens: int, stop_ids: Iterable[int]
) -> list[list[int]]:
    """What llama.cpp makes of each prompt, greedily, ended by (and including) a stop id or after `new_tokens`.

    Raises PeerError if it gives up.
    """
    room = [str(max(map(len, prompts)) + new_tokens), str(min(_SEQUENCES, len(prompts))), str(new_tokens)]
    asked = b"".join(np.array([len(ids), *ids], "<i4").tobytes() for ids in prompts)
    told = _run(tools, ["answers", str(path), *room, *map(str, stop_ids)], path, asked)
    numbers, made = np.frombuffer(told, "<i4").tolist(), dict[int, list[int]]()
    while numbers:
        index, count = numbers[:2]
        made[index], numbers = numbers[2 : 2 + count], numbers[2 + count :]
    return [made[index] for index in range(len(prompts))]


def speed(
    tools: LlamaCpp, path: Path, prompt_tokens: int, new_tokens: int, repeat: int = 3, threads: int = 0
) -> tuple[float, float]:
    """Tokens/s of a prompt, and of `new_tokens` after it, by llama-bench: medians of `repeat` runs behind one that
    warms up, a thread a core for 0. Raises PeerError if llama.cpp gives up."""
    asked = [str(tools.bench), "-m", str(path), "-t", str(threads or os.cpu_count() or 1), "-r", str(repeat)]
    prompt = ["-p", str(prompt_tokens), "-n", "0"]
    after = ["-p", "0", "-n", str(new_tokens), "-d", str(prompt_tokens)]
    prefill, decode = (_bench([*asked, *words, "-o", "json"], path) for words in (prompt, after))
    return prefill, decode


def _bench(command: list[str], path: Path) -> float:
    """The median of the one test that a command of llama-bench asks for."""
    log = path.with_suffix(".bench.log")
    with log.open("wb") as output:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=output)
    if done.returncode:
        raise PeerError(f"llama-bench does not run it: exit code {done.returncode} ({log})")
    (test,) = json.loads(done.stdout)
    return statistics.median(map(float, test["samples_ts"]))


def _run(tools: LlamaCpp, arguments: list[str], path: Path, given: bytes) -> bytes:
    log = path.with_suffix(".run.log")
    with log.open("wb") as output:
        done = subprocess.run([str(tools.runner), *arguments], input=given, stdout=subprocess.PIPE, stderr=output)
    if done.returncode:
        raise PeerError(f"llama.cpp does not run it: exit code {done.returncode} ({log})")
    return done.stdout


def _log(out: Path) -> Path:
    return out.with_name(out.name + ".log")


def _sources(folder: Path) -> Path:
    """llama.cpp's folder out of the source package."""
    inside = f"llama_cpp_python-{VERSION}/vendor/llama.cpp"
    if not (folder / inside / "CMakeLists.txt").is_file():
        # `:all:` would hold for what the package is built with too, and build cmake from its sources first.
        as_source = ["--no-deps", "--no-binary", "llama-cpp-python"]
        download = [sys.executable, "-m", "pip", "download", *as_source, "-d", str(folder)]
        run_tool([*download, f"llama-cpp-python=={VERSION}"], folder / "download.log")
        with tarfile.open(folder / f"llama_cpp_python-{VERSION}.tar.gz") as package:
            members = [member for member in package if member.name.startswith(inside + "/")]
            package.extractall(folder, members, filter="data")
    return folder / inside
