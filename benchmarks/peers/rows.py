"""The table: each peer's file of one checkpoint, made, read back and measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.answering import Material, asked_of, graph_answers, machine_load
from benchmarks.peers import autoround, genai_builder
from benchmarks.peers.gguf_file import GGUFWeights, gguf_package, write_gguf
from benchmarks.peers.imatrix import second_moments, write_imatrix
from benchmarks.peers.llama_cpp import LLAMA_TYPES, LlamaCpp, answers, llama_cpp, open_logits, quantize, speed
from benchmarks.peers.onnx_model import ONNXLogits, ONNXWeights
from benchmarks.peers.tool import Cost, PeerError
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.weights import Tensors, expected_tensors
from toolkit.errors import ToolkitError
from toolkit.evaluate.answers import Answers, judged
from toolkit.evaluate.parity import Comparison
from toolkit.evaluate.speed import measure_speed_apart
from toolkit.reference.decoder import head_logits, reference_hidden
from toolkit.report.sections import Answered, Divergence

PEERS: Final = (*(f"llama.cpp {kind}" for kind in LLAMA_TYPES), *genai_builder.ALGORITHMS, *autoround.SYMMETRIC)
Progress = Callable[[str], None]


# Of the speed that rows say: a prompt in one pass, then tokens one by one.
PROMPT_TOKENS: Final = 128
NEW_TOKENS: Final = 64


@dataclass(frozen=True)
class Row:
    """One file of a checkpoint: this toolkit's, or a peer's.

    `bits_per_weight` is over the checkpoint's matrices, scales included, from the file. `weights_alone` are figures of
    the weights without rounded activations; `as_it_runs`, `answered` and the tokens/s are of the file in its own
    runtime on this CPU, None where it was not run. `right` lists the questions that were answered rightly. `wall_s` and
    `peak_rss_bytes` are the making process's own. `load` is the machine's load average when the file was made,
    `timed_at_load` when its tokens/s were measured: beyond 1 they say little.
    """

    name: str
    bits_per_weight: float
    weights_alone: Divergence
    as_it_runs: Divergence | None
    wall_s: float
    peak_rss_bytes: int
    note: str
    answered: Answered | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    load: float | None = None
    right: tuple[int, ...] = ()
    timed_at_load: float | None = None


class _Weights(Tensors, Protocol):
    """A peer's file as the reference's tensors; see GGUFWeights, ONNXWeights."""

    config: ModelConfig

    def matrix_bytes(self) -> int: ...


class Bench:
    """The checkpoint's side of every comparison, computed once: its logits lie in a file of `folder`.

    Speeds are measured where `speeds` says so; llama.cpp's files stay where `keeps_files` does.
    """

    def __init__(
        self, checkpoint: Checkpoint, material: Material, folder: Path, speeds: bool = False, keeps_files: bool = False
    ) -> None:
        self.checkpoint, self.material, self.speeds, self.keeps_files = checkpoint, material, speeds, keeps_files
        shapes = expected_tensors(checkpoint.config).values()
        self._weights = sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
        self._logits = _reference_logits(checkpoint, material.sequences, folder / "logits.npy")

    def asking(self, answers: bool, speeds: bool) -> Bench:
        """Returns the same for rows that leave out questions, or speeds."""
        asking = copy(self)
        asking.material = replace(self.material, task=self.material.task if answers else None)
        asking.speeds = speeds
        return asking

    def bits_per_weight(self, nbytes: int) -> float:
        """Of `nbytes` for the checkpoint's matrices."""
        return 8 * nbytes / self._weights

    def compare(self, logits_of: Callable[[int], Any]) -> Divergence:
        """Figures of the logits that `logits_of` gives for the k-th sequence."""
        comparison, start = Comparison(), 0
        for k, ids in enumerate(self.material.sequences):
            comparison.add(self._logits[start : start + len(ids)], logits_of(k), ids)
            start += len(ids)
        return comparison.figures()

    def weights_alone(self, weights: _Weights) -> Divergence:
        """Figures of the reference with a peer's weights."""
        hidden = reference_hidden(weights.config, weights, self.material.sequences)
        rows = head_logits(weights.config, weights, np.concatenate(hidden))
        starts = np.cumsum([0, *map(len, self.material.sequences)])
        return self.compare(lambda k: rows[starts[k] : starts[k + 1]])


def _reference_logits(checkpoint: Checkpoint, sequences: list[list[int]], path: Path) -> NDArray[np.float32]:
    """Logits [tokens, vocabulary] of all sequences, in a file that is mapped. The head is read once."""
    hidden = np.concatenate(reference_hidden(checkpoint.config, checkpoint.source, sequences))
    np.save(path, head_logits(checkpoint.config, checkpoint.source, hidden))
    logits: NDArray[np.float32] = np.load(path, mmap_mode="r")
    return logits


def peer_rows(
    bench: Bench, folder: Path, files: Path, only: Sequence[str] = PEERS, progress: Progress = lambda _: None
) -> tuple[list[Row], dict[str, str]]:
    """A row for each of `only` that can be made, and the reason by name for each that cannot.

    Tools are installed in `folder`, files written to `files`.
    """
    files.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    for group, prepare in (("llama.cpp ", _llama_cpp), ("genai ", _genai), ("auto-round", _auto_round)):
        wanted = [name for name in only if name.startswith(group)]
        if not wanted:
            continue
        try:
            progress(f"{group.strip()}: getting ready")
            make = prepare(bench, wanted, folder, files)
        except ToolkitError as problem:
            left_out |= dict.fromkeys(wanted, str(problem))
            continue
        for name in wanted:
            progress(name)
            try:
                load = machine_load()
                rows.append(replace(make(name), load=load))
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
    sequences, begin = bench.material.calibration_sequences, time.perf_counter()
    if sequences and any(kind.imatrix for kind in kinds.values()):
        moments = second_moments(checkpoint.config, checkpoint.source, sequences)
        write_imatrix(imatrix, moments, len(sequences))
    calibrated = f"; imatrix of {sum(map(len, sequences))} tokens, {time.perf_counter() - begin:.0f} s more in numpy"

    def make(name: str) -> Row:
        kind = kinds[name]
        if kind.imatrix and not sequences:
            raise PeerError("an importance matrix needs calibration text: name one with --calibration")
        out = llama_file(work, name)
        cost = quantize(tools, source, kind, imatrix if kind.imatrix else None, out)
        weights = GGUFWeights(out, checkpoint.config)
        note = ", ".join(f"{count} {stored}" for stored, count in weights.formats().most_common())
        note += calibrated if kind.imatrix else ""
        row = _run_gguf(tools, out, bench, row_of(name, bench, weights, cost, note))
        if not bench.keeps_files:
            out.unlink()
        return row

    return make


def llama_file(work: Path, name: str) -> Path:
    """Where the file of one of llama.cpp's rows lies while it is measured."""
    return work / f"{name.removeprefix('llama.cpp ')}.gguf"


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


def _auto_round(bench: Bench, wanted: Sequence[str], folder: Path, work: Path) -> Callable[[str], Row]:
    """The maker of AutoRound's rows, once it is installed."""
    python = autoround.autoround_python(folder)
    sequences = bench.material.calibration_sequences

    def make(name: str) -> Row:
        if not sequences:
            raise PeerError("AutoRound needs calibration text: name one with --calibration")
        out = work / name.replace(" ", "-")
        cost = autoround.quantize(python, bench.checkpoint.folder, sequences, autoround.SYMMETRIC[name], out)
        weights = autoround.AutoRoundWeights(autoround.written(out), bench.checkpoint)
        note = f"{weights.linear_bits_per_weight():.2f} bits a weight without {weights.floats()}"
        note += f"; {autoround.ITERATIONS} iterations of {autoround.BATCH_SIZE} sequences, of {len(sequences)}"
        return row_of(name, bench, weights, cost, f"{note}; not run: it has no runtime of its own for a CPU")

    return make


def row_of(name: str, bench: Bench, weights: _Weights, cost: Cost, note: str) -> Row:
    """The row of a file that has not been run."""
    bits = bench.bits_per_weight(weights.matrix_bytes())
    return Row(name, bits, bench.weights_alone(weights), None, cost.wall_s, cost.peak_rss_bytes, note)


def _run_gguf(tools: LlamaCpp, path: Path, bench: Bench, row: Row) -> Row:
    """The row with what the file does in llama.cpp, or why it does nothing there."""
    config, sequences, task = bench.checkpoint.config, bench.material.sequences, bench.material.task
    if config.rope.rope_type != "default" or any(config.structure.sliding_windows):
        return replace(row, note=f"{row.note}; not run: the file says nothing of scaled RoPE or sliding windows")
    try:
        with open_logits(tools, path, config.vocab_size, max(map(len, sequences))) as model:
            row = replace(row, as_it_runs=bench.compare(lambda k: model.logits(sequences[k])))
        if task is not None:
            asked = asked_of(bench.checkpoint, task)
            made = answers(tools, path, asked.ids, asked.new_tokens, asked.stop_ids)
            row = _with_answers(row, judged(asked, made))
        if bench.speeds:
            row = _timed(row, lambda: speed(tools, path, PROMPT_TOKENS, NEW_TOKENS))
    except PeerError as problem:
        return replace(row, note=f"{row.note}; {problem}")
    return row


def _run_onnx(folder: Path, bench: Bench, row: Row) -> Row:
    """The row with what the model does in ONNX Runtime and onnxruntime-genai, or why it does nothing there."""
    try:
        model = ONNXLogits(folder / "model.onnx", bench.checkpoint.config)
        row = replace(row, as_it_runs=bench.compare(lambda k: model.logits(bench.material.sequences[k])))
        return run_in_genai(folder, bench, row)
    except ToolkitError as problem:
        return replace(row, note=f"{row.note}; {problem}")


def run_in_genai(folder: Path, bench: Bench, row: Row) -> Row:
    """The row with answers by a folder's model.onnx, and its speed in onnxruntime-genai, as far as they are asked for.

    Raises ToolkitError where it does not run.
    """
    task = bench.material.task
    if task is not None:
        asked = asked_of(bench.checkpoint, task)
        row = _with_answers(row, judged(asked, graph_answers(folder, asked)))
    if bench.speeds:

        def measured() -> tuple[float, float]:
            speeds = measure_speed_apart(folder, PROMPT_TOKENS, NEW_TOKENS, repeat=3)
            return speeds.prefill_tokens_per_s, speeds.decode_tokens_per_s

        row = _timed(row, measured)
    return row


def _with_answers(row: Row, answers: Answers) -> Row:
    right = tuple(int(k) for k in np.flatnonzero(answers.right))
    return replace(row, answered=answers.figures(), right=right)


def _timed(row: Row, measured: Callable[[], tuple[float, float]]) -> Row:
    load = machine_load()
    prefill, decode = measured()
    return replace(row, prefill_tokens_per_s=prefill, decode_tokens_per_s=decode, timed_at_load=load)
