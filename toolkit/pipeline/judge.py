"""The proof story: the bundle beside its checkpoint's reference, on tokens, answers and time; then the verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.bundle.genai_config import read_settings
from toolkit.bundle.manifest import read_manifest
from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.weights import parameter_count
from toolkit.epcontext.htp import PROVIDER, htp_version
from toolkit.errors import BundleError, MachineError, RecipeError
from toolkit.evaluate.answers import (
    Answers,
    Asked,
    ask,
    bundle_answers,
    compared,
    first_of,
    reference_answers,
    simulated_answers,
)
from toolkit.evaluate.parity import Comparison, matching_prefix
from toolkit.evaluate.positions import open_positions, rounds_activations
from toolkit.evaluate.rounded import PLAIN_BITS_PER_WEIGHT, PLAIN_NAME, plain_rounding
from toolkit.evaluate.session import continuations, is_here
from toolkit.evaluate.simulated_loop import simulated_continuations
from toolkit.evaluate.simulator import simulate, simulated_divergence
from toolkit.evaluate.speed import measure_speed_apart
from toolkit.evaluate.tasks import Task, read_task
from toolkit.machine import free_memory_bytes
from toolkit.pipeline.text import token_sequences
from toolkit.recipe import data_folder, model_facts
from toolkit.reference.decoder import head_logits, reference_hidden
from toolkit.report.summary import judge, read_report, section_of, write_report
from toolkit.target import CPU_EP

_TEXT_FILE: Final = "reasoning.jsonl"
_REFERENCE: Final = "numpy float32 forward of the checkpoint"
_FP32_THRESHOLDS: Final = {"max_abs_logit_error": 1e-3, "accuracy_drop": 0.005}
# What a thought needs.
_SHORTEST: Final = 160
_GREEDY_PROMPT, _GREEDY_NEW = 24, 32
_WEIGHT_FIGURES: Final = ("mean_kld", "median_kld", "p99_kld", "p999_kld", "top1_agreement")
# The bundle's logits are taken from one run over this many tokens, and again with the cache over the first of them.
_DECODED_TOKENS: Final = 48
_BENCH: Final = (128, 64, 3)
# Through onnxruntime-genai with the transformer in the simulator.
_SIMULATED_NEW: Final = 8
# The simulator takes seconds a token at the width of the 1.5B, so a larger transformer is simulated on request.
_SIMULATED_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class Effort:
    """How much is measured. `examples` None asks every question of a task; `baseline` None leaves it to the recipe, and
    `simulate` None to the transformer's size.

    `tasks` asks the recipe's own, beside `own_tasks`; an answer may have `max_new_tokens`. `simulated_examples` of each
    task are asked in the simulator too, and `simulated_tokens` compared there, 0 for two windows.
    """

    tokens: int = 2000
    examples: int | None = None
    tasks: bool = True
    own_tasks: tuple[Task, ...] = ()
    max_new_tokens: int = 300
    speed: bool = True
    baseline: bool | None = None
    text: Path | None = None
    simulate: bool | None = None
    simulated_examples: int = 0
    simulated_tokens: int = 0


def judge_bundle(
    bundle: Path, checkpoint: Checkpoint, effort: Effort, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measures, rewrites report.json and report.html, returns the report.

    Raises BundleError or CheckpointError if either cannot be read or they do not belong together.
    """
    manifest = read_manifest(bundle)
    _check_same(manifest, checkpoint)
    recipe = manifest["recipe"]
    report = read_report(bundle, manifest)
    reasons: dict[str, str] = {}
    wants_baseline = recipe["baseline"] if effort.baseline is None else effort.baseline
    tasks = [_task_file(name, recipe, checkpoint) for name in recipe["tasks"]]
    text = effort.text or (tasks or [data_folder("models") / _TEXT_FILE])[0]
    sequences = token_sequences(checkpoint, text, effort.tokens, _SHORTEST)
    here = is_here(read_settings(bundle))
    asked = _asked(bundle, tasks, effort, not here)
    reference = _ReferenceAnswers(checkpoint)
    report |= _parity_sections(bundle, checkpoint, sequences, wants_baseline, not here, progress)
    reasons |= _place(report, here)
    reasons |= _simulate(report, bundle, checkpoint, manifest, sequences, asked, reference, effort, progress)
    if effort.baseline is False:
        reasons["baseline"] = "left out by --no-baseline"
    if not effort.tasks:
        reasons["tasks"] = "left out by --no-tasks"
    if asked:
        report["tasks"] = _tasks_section(bundle, asked, reference, report.get("baseline"), not here, progress)
        if any("reference_accuracy" not in row for row in report["tasks"]):
            reasons["tasks.reference_accuracy"] = "the checkpoint as float32 does not fit into this machine's memory"
    if effort.speed and not here:
        reasons["speed"] = "the execution provider of the bundle is not on this machine: `toolkit bench --on-cpu`"
    elif effort.speed:
        progress("speed")
        report["speed"] = _speed_section(bundle)
    else:
        reasons["speed"] = "left out by --no-speed"
    thresholds = _thresholds(manifest, report)
    report["verdict"] = judge(report, thresholds)
    return write_report(bundle, report, reasons)


def _place(report: dict[str, Any], here: bool) -> dict[str, str]:
    """Writes where ORT put each stage's nodes into `partition`; returns why that is not known for the others."""
    placements = report.pop("placements")
    for row in report.get("partition", []):
        if row["ep"] == CPU_EP:
            counts = placements[row["stage"]]
            row |= {"nodes_run": sum(counts.values()), "nodes_on_ep": counts.get(CPU_EP, 0)}
    elsewhere = [row for row in report.get("partition", []) if row["ep"] != CPU_EP and not row["compiled"]]
    others = sorted({row["ep"] for row in elsewhere})
    if not others:
        return {}
    reasons = {}
    if PROVIDER in others:
        reasons["partition.bin_bytes"] = "not compiled ahead of time: `toolkit compile`"
    ran = "ran" if here else "is not on this machine: every stage ran on the CPU"
    tables = "the nodes were checked against the operators it is known to take"
    return {**reasons, "partition.nodes_on_ep": f"{' and '.join(others)} {ran}; {tables}"}


def _simulate(
    report: dict[str, Any],
    bundle: Path,
    checkpoint: Checkpoint,
    manifest: dict[str, Any],
    sequences: list[list[int]],
    asked: list[Asked],
    reference: _ReferenceAnswers,
    effort: Effort,
    progress: Callable[[str], None],
) -> dict[str, str]:
    """Writes `simulator`, or returns why there is none."""
    wanted = effort.simulate
    recipe = manifest["recipe"]
    if not recipe["soc"]:
        return {}
    data = bundle / names.TRANSFORMER_DATA_FILE
    large = not data.is_file() or data.stat().st_size > _SIMULATED_BYTES
    if wanted is False or (wanted is None and large):
        return {"simulator": "left out by --no-simulate" if wanted is False else "takes long at this size: --simulate"}
    try:
        htp_version()
    except MachineError as problem:
        return {"simulator": str(problem)}
    windows, decoded = (1, 1) if large else (2, 8)
    cut = [token for sequence in sequences for token in sequence][: windows * recipe["window"] + decoded]
    config, source = checkpoint.config, checkpoint.source
    logits = head_logits(config, source, reference_hidden(config, source, [cut])[0])
    report["simulator"] = simulate(bundle, cut, max(len(cut) - decoded, 1), logits, progress)
    if effort.simulated_tokens:
        first = _first_tokens(sequences, effort.simulated_tokens)
        progress(f"{sum(map(len, first))} tokens in the simulator")
        expected = (head_logits(config, source, hidden) for hidden in reference_hidden(config, source, first))
        report["simulator"] |= simulated_divergence(bundle, first, expected)
    if not large:
        progress("greedy tokens through onnxruntime-genai in the simulator")
        prompt = cut[:_GREEDY_PROMPT]
        (made,) = simulated_continuations(bundle, [prompt], _SIMULATED_NEW)
        hidden = reference_hidden(config, source, [prompt + made])[0]
        best = head_logits(config, source, hidden[len(prompt) - 1 : -1]).argmax(axis=-1)
        matched = matching_prefix(best.tolist(), made)
        report["simulator"] |= {"greedy_match_tokens": matched, "greedy_tokens": len(made)}
    if not effort.simulated_examples:
        return {"simulator.tasks": "slow: ask some questions in the simulator with --simulate-examples"}
    rows = []
    for task in asked:
        some = first_of(task, effort.simulated_examples)
        progress(f"task {task.task.name}: {len(some.ids)} questions in the simulator")
        ours = simulated_answers(bundle, some)
        row = {"name": task.task.name, "examples": len(some.ids), "max_new_tokens": some.new_tokens, **ours.figures()}
        if theirs := reference.to(task, progress):
            theirs = theirs.first(len(some.ids))
            row |= {**theirs.figures("reference_"), **compared(ours, theirs)}
        rows.append(row)
    report["simulator"]["tasks"] = rows
    return {}


def _first_tokens(sequences: list[list[int]], tokens: int) -> list[list[int]]:
    """So many tokens of the sequences, the last one cut."""
    starts = [sum(map(len, sequences[:k])) for k in range(len(sequences))]
    return [ids[: tokens - start] for ids, start in zip(sequences, starts, strict=True) if start < tokens]


def _thresholds(manifest: dict[str, Any], report: dict[str, Any]) -> dict[str, float]:
    """The recipe's, or those of an unquantized bundle; what was left out on request is not checked, and said to be."""
    wanted = _FP32_THRESHOLDS if manifest["precision"] == "fp32" else manifest["recipe"]["validate"]
    left_out = {section for section in ("tasks", "speed", "simulator") if section not in report}
    if "tasks" not in report.get("simulator", {}):
        left_out.add("simulator.tasks")
    return {name: limit for name, limit in wanted.items() if section_of(name) not in left_out}


def _check_same(manifest: dict[str, Any], checkpoint: Checkpoint) -> None:
    """By name and size: hashing 30 GB to be told what was just read would double the wait."""
    made_from = {entry["name"]: entry.get("bytes") for entry in manifest["checkpoint"]}
    found = {entry["name"]: entry.get("bytes") for entry in checkpoint.source.identity()}
    if made_from != found:
        raise BundleError(
            f"the bundle was made from {', '.join(made_from)}, the checkpoint in {checkpoint.folder} has "
            f"{', '.join(map(str, found))} or other sizes: name the right one with --checkpoint"
        )


def _parity_sections(
    bundle: Path,
    checkpoint: Checkpoint,
    sequences: list[list[int]],
    wants_baseline: bool,
    on_cpu: bool,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    config, source = checkpoint.config, checkpoint.source
    prompt = sequences[0][:_GREEDY_PROMPT]
    progress("greedy tokens through onnxruntime-genai")
    (made,) = continuations(bundle, [prompt], _GREEDY_NEW, on_cpu)
    hidden = reference_hidden(config, source, [*sequences, prompt + made], progress)
    greedy = head_logits(config, source, hidden.pop()[len(prompt) - 1 : -1]).argmax(axis=-1)
    plain = plain_rounding(source) if wants_baseline else None
    plain_hidden = reference_hidden(config, plain, sequences) if plain else None
    session, ours, theirs = open_positions(bundle), Comparison(), Comparison()
    cached_error = 0.0
    progress("logits of the bundle")
    for k, ids in enumerate(sequences):
        expected, actual = head_logits(config, source, hidden[k]), session.logits(ids)
        ours.add(expected, actual, ids)
        if k == 0:
            decoded = session.logits(ids[:_DECODED_TOKENS], prompt=min(len(ids), _DECODED_TOKENS // 2))
            cached_error = float(np.abs(decoded - expected[:_DECODED_TOKENS]).max())
        if plain and plain_hidden:
            theirs.add(expected, head_logits(config, plain, plain_hidden[k]), ids)
    parity = {"reference": _REFERENCE, **ours.figures()}
    parity["max_abs_logit_error"] = max(parity["max_abs_logit_error"], cached_error)
    parity |= {"greedy_match_tokens": matching_prefix(greedy.tolist(), made), "greedy_tokens": len(made)}
    sections = {"parity": parity, "placements": session.placements()}
    del session
    if rounds_activations(bundle):
        progress("logits of the bundle's weights alone")
        parity["weights_alone"] = _weights_alone(bundle, checkpoint, sequences, hidden)
    if plain:
        figures = theirs.figures()
        del figures["tokens"], figures["reference_perplexity"]
        sections["baseline"] = {"name": PLAIN_NAME, "bits_per_weight": PLAIN_BITS_PER_WEIGHT, **figures}
    return sections


def _weights_alone(
    bundle: Path, checkpoint: Checkpoint, sequences: list[list[int]], hidden: list[NDArray[np.float32]]
) -> dict[str, float]:
    """The divergence that is left where products take their inputs as they are: what the weights themselves cost."""
    session, comparison = open_positions(bundle, exact=True), Comparison()
    for ids, last in zip(sequences, hidden, strict=True):
        comparison.add(head_logits(checkpoint.config, checkpoint.source, last), session.logits(ids), ids)
    figures = comparison.figures()
    return {name: figures[name] for name in _WEIGHT_FIGURES}


def _asked(bundle: Path, files: list[Path], effort: Effort, on_cpu: bool) -> list[Asked]:
    """The tasks as the bundle is asked them: the recipe's and a user's own. Raises RecipeError for two of one name."""
    tasks = [*((read_task(path, effort.examples) for path in files) if effort.tasks else ()), *effort.own_tasks]
    for k, task in enumerate(tasks):
        if any(task.name == other.name for other in tasks[:k]):
            raise RecipeError(f"two tasks are called {task.name!r}: rename the file of one, rows go by its name")
    return [ask(bundle, task, effort.max_new_tokens, on_cpu) for task in tasks]


class _ReferenceAnswers:
    """The checkpoint's answers, each task asked once, and only where its weights fit into memory."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._resident = 8 * parameter_count(checkpoint.config) < free_memory_bytes()
        self._made: dict[str, Answers] = {}

    def to(self, asked: Asked, progress: Callable[[str], None]) -> Answers | None:
        """Its answers to a task; None where it does not fit."""
        name = asked.task.name
        if self._resident and name not in self._made:
            progress(f"task {name}: the reference")
            self._made[name] = reference_answers(self.checkpoint.config, self.checkpoint.source, asked)
        return self._made.get(name)


def _tasks_section(
    bundle: Path,
    tasks: list[Asked],
    reference: _ReferenceAnswers,
    baseline: dict[str, Any] | None,
    on_cpu: bool,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Accuracy of bundle and reference; the baseline's goes into its own section."""
    config, source = reference.checkpoint.config, reference.checkpoint.source
    rows = []
    for asked in tasks:
        identity = {"name": asked.task.name, "examples": len(asked.ids)}
        progress(f"task {asked.task.name}: {len(asked.ids)} questions")
        ours = bundle_answers(bundle, asked, on_cpu)
        row = {**identity, "max_new_tokens": asked.new_tokens, **ours.figures()}
        if theirs := reference.to(asked, progress):
            row |= {**theirs.figures("reference_"), **compared(ours, theirs)}
            if baseline is not None:
                progress(f"task {asked.task.name}: plain 4-bit rounding")
                plain = reference_answers(config, plain_rounding(source), asked)
                baseline.setdefault("tasks", []).append({**identity, **plain.figures()})
        rows.append(row)
    return rows


def _speed_section(bundle: Path) -> dict[str, Any]:
    prompt, new, repeat = _BENCH
    room = read_settings(bundle)["model"]["context_length"]
    if prompt + new > room:
        prompt, new = room // 2, room - room // 2
    return measure_speed_apart(bundle, prompt, new, repeat)


def _task_file(task: str, recipe: dict[str, Any], checkpoint: Checkpoint) -> Path:
    """A task's questions: the checkpoint's own, or those beside the model's facts."""
    own = checkpoint.folder / f"{task}.jsonl"
    facts = model_facts(recipe["name"], recipe["target"])
    return facts / own.name if facts and not own.is_file() else own
