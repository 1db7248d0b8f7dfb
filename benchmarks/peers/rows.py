"""The table: each peer's file of one checkpoint, made, read back and measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from benchmarks.peers import genai_builder
from benchmarks.peers.gguf_file import GGUFWeights, gguf_package, write_gguf
from benchmarks.peers.imatrix import second_moments, write_imatrix
from benchmarks.peers.llama_cpp import LLAMA_TYPES, LlamaCpp, llama_cpp, open_logits, quantize
from benchmarks.peers.onnx_model import ONNXLogits, ONNXWeights
from benchmarks.peers.questions import asked_of
from benchmarks.peers.tool import Cost, PeerError
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.weights import Tensors, expected_tensors
from toolkit.errors import ToolkitError
from toolkit.evaluate.answers import bundle_answers, reference_answers
from toolkit.evaluate.parity import Comparison
from toolkit.evaluate.tasks import Task
from toolkit.reference.decoder import head_logits, reference_hidden

PEERS: Final = (*(f"llama.cpp {kind}" for kind in LLAMA_TYPES), *genai_builder.ALGORITHMS)
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One peer's file.

    `bits_per_weight` is over the checkpoint's matrices, scales included, from the file. `weights_alone` has
    `Comparison.figures` of the reference on the dequantized weights, `as_it_runs` those of the file in its runtime on
    this CPU, None where it could not be run. Accuracies are shares of right answers, None without a task and for
    llama.cpp as it runs. `wall_s` and `peak_rss_bytes` are the tool's own process.
    """

    name: str
    bits_per_weight: float
    weights_alone: dict[str, Any]
    as_it_runs: dict[str, Any] | None
    accuracy: float | None
    accuracy_as_it_runs: float | None
    wall_s: float
    peak_rss_bytes: int
    note: str


@dataclass(frozen=True)
class Material:
    """What peers are measured on: token sequences, other ones to calibrate on, and questions."""

    sequences: list[list[int]]
    calibration_sequences: list[list[int]]
    task: Task | None = None


class _Weights(Tensors, Protocol):
    """A peer's file as the reference's tensors; see GGUFWeights, ONNXWeights."""

    config: ModelConfig

    def matrix_bytes(self) -> int: ...


class Bench:
    """The checkpoint's side of every comparison, computed once."""

    def __init__(self, checkpoint: Checkpoint, material: Material) -> None:
        self.checkpoint, self.material = checkpoint, material
        self._hidden = reference_hidden(checkpoint.config, checkpoint.source, material.sequences)
        shapes = expected_tensors(checkpoint.config).values()
        self._weights = sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)

    def bits_per_weight(self, nbytes: int) -> float:
        """Of `nbytes` for the checkpoint's matrices."""
        return 8 * nbytes / self._weights

    def compare(self, logits_of: Callable[[int], Any]) -> dict[str, Any]:
        """Figures of the logits that `logits_of` gives for the k-th sequence."""
        comparison, config = Comparison(), self.checkpoint.config
        for k, ids in enumerate(self.material.sequences):
            comparison.add(head_logits(config, self.checkpoint.source, self._hidden[k]), logits_of(k), ids)
        return vars(comparison.figures())

    def weights_alone(self, weights: _Weights) -> tuple[dict[str, Any], float | None]:
        """Figures and accuracy of the reference with a peer's weights."""
        hidden = reference_hidden(weights.config, weights, self.material.sequences)
        figures = self.compare(lambda k: head_logits(weights.config, weights, hidden[k]))
        task = self.material.task
        if task is None:
            return figures, None
        answers = reference_answers(weights.config, weights, asked_of(self.checkpoint, task))
        return figures, float(answers.right.mean())


def peer_rows(
    checkpoint: Checkpoint,
    material: Material,
    folder: Path,
    only: Sequence[str] = PEERS,
    progress: Progress = lambda _: None,
) -> tuple[list[Row], dict[str, str]]:
    """A row for each of `only` that can be made, and the reason by name for each that cannot.

    Tools are installed and files written under `folder`.
    """
    bench, work = Bench(checkpoint, material), folder / "files" / checkpoint.folder.resolve().name
    work.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    for group, prepare in (("llama.cpp ", _llama_cpp), ("genai ", _genai)):
        wanted = [name for name in only if name.startswith(group)]
        if not wanted:
            continue
        try:
            progress(f"{group.strip()}: getting ready")
            make = prepare(bench, wanted, folder, work)
        except ToolkitError as problem:
            left_out |= dict.fromkeys(wanted, str(problem))
            continue
        for name in wanted:
            progress(name)
            try:
                rows.append(make(name))
            except ToolkitError as problem:
                left_out[name] = str(problem)
    return rows, left_out


def _llama_cpp(bench: Bench, wanted: Sequence[str], folder: Path, work: Path) -> Callable[[str], Row]:
    """The maker of llama.cpp's rows, once there is something to make them with."""
    kinds = {name: LLAMA_TYPES[name.removeprefix("llama.cpp ")] for name in wanted}
    gguf_package()
    tools = llama_cpp(folder)
    source, imatrix, checkpoint = work / "checkpoint.gguf", work / "imatrix.dat", bench.checkpoint
    write_gguf(checkpoint, source)
    calibration, begin = bench.material.calibration_sequences, time.perf_counter()
    if calibration and any(kind.imatrix for kind in kinds.values()):
        moments = second_moments(checkpoint.config, checkpoint.source, calibration)
        write_imatrix(imatrix, moments, len(calibration))
    calibrated = f"; imatrix of {sum(map(len, calibration))} tokens, {time.perf_counter() - begin:.0f} s more in numpy"

    def make(name: str) -> Row:
        kind = kinds[name]
        if kind.imatrix and not calibration:
            raise PeerError("an importance matrix needs calibration text: name one with --calibration")
        out = work / f"{name.removeprefix('llama.cpp ')}.gguf"
        cost = quantize(tools, source, kind, imatrix if kind.imatrix else None, out)
        weights = GGUFWeights(out, checkpoint.config)
        note = ", ".join(f"{count} {stored}" for stored, count in weights.formats().most_common())
        note += calibrated if kind.imatrix else ""
        return _run_gguf(tools, out, bench, row_of(name, bench, weights, cost, note))

    return make


def _genai(bench: Bench, wanted: Sequence[str], folder: Path, work: Path) -> Callable[[str], Row]:
    """The maker of the builder's rows, once it is installed."""
    python = genai_builder.builder_python(folder)

    def make(name: str) -> Row:
        out = work / name.replace(" ", "-")
        cost = genai_builder.build(python, bench.checkpoint.folder, genai_builder.ALGORITHMS[name], out)
        weights = ONNXWeights(out / "model.onnx", bench.checkpoint)
        formats = ", ".join(f"{count} {stored}" for stored, count in weights.formats().most_common())
        note = f"{formats}; {weights.linear_bits_per_weight():.2f} bits a weight without the embedding"
        return _run_onnx(out, bench, row_of(name, bench, weights, cost, note))

    return make


def row_of(name: str, bench: Bench, weights: _Weights, cost: Cost, note: str) -> Row:
    figures, accuracy = bench.weights_alone(weights)
    bits = bench.bits_per_weight(weights.matrix_bytes())
    return Row(name, bits, figures, None, accuracy, None, cost.wall_s, cost.peak_rss_bytes, note)


def _run_gguf(tools: LlamaCpp, path: Path, bench: Bench, row: Row) -> Row:
    """The row with the file's logits in llama.cpp, or why there are none. Its answers are not asked for."""
    config, sequences = bench.checkpoint.config, bench.material.sequences
    if config.rope.rope_type != "default" or any(config.structure.sliding_windows):
        return replace(row, note=f"{row.note}; not run: the file says nothing of scaled RoPE or sliding windows")
    try:
        with open_logits(tools, path, config.vocab_size, max(map(len, sequences))) as model:
            return replace(row, as_it_runs=bench.compare(lambda k: model.logits(sequences[k])))
    except PeerError as problem:
        return replace(row, note=f"{row.note}; {problem}")


def _run_onnx(folder: Path, bench: Bench, row: Row) -> Row:
    """The row with what the model does in ONNX Runtime and onnxruntime-genai, or why it does nothing there."""
    task, accuracy = bench.material.task, None
    try:
        model = ONNXLogits(folder / "model.onnx", bench.checkpoint.config)
        figures = bench.compare(lambda k: model.logits(bench.material.sequences[k]))
        if task is not None:
            accuracy = float(bundle_answers(folder, asked_of(bench.checkpoint, task)).right.mean())
    except ToolkitError as problem:
        return replace(row, note=f"{row.note}; {problem}")
    return replace(row, as_it_runs=figures, accuracy_as_it_runs=accuracy)
