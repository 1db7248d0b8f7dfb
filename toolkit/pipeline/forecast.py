"""What an export takes, phase by phase, before it begins: seconds on this machine, memory and disk.

Each phase's work is counted from shapes and divided by what the machine does in a second (pipeline/work.py). What no
shape tells says so: the rate of a download is assumed, and a compiler's was measured elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolkit.checkpoint.weights import parameter_count
from toolkit.partition.parts import layer_bytes
from toolkit.pipeline.calibration_work import PASSES_TO_SEARCH
from toolkit.pipeline.judge.effort import Effort
from toolkit.pipeline.judge.simulator import SIMULATED_BYTES
from toolkit.pipeline.judge.subject import task_file
from toolkit.pipeline.judge.work import Sample, sample, validation_work
from toolkit.pipeline.plan import ExportPlan
from toolkit.pipeline.work import TYPICAL, MachineSpeed, Work
from toolkit.target import CPU_EP

# Bytes a second of a download: 200 megabits.
_DOWNLOAD_RATE: Final = 25e6
# Qualcomm's compiler, on a typical machine: seconds a part, a byte of weights, a row of RoPE's tables in a part, and a
# head's score of one cached token (LOG.md).
_COMPILE_PART: Final = 5.0
_COMPILE_BYTE: Final = 2.6e-7
_COMPILE_ROW: Final = 1.8e-4
_COMPILE_SCORE: Final = 1.5e-5
# The simulator of a small transformer: two windows and some tokens of it.
_SIMULATED_SECONDS: Final = 40.0


@dataclass(frozen=True)
class Phase:
    """One phase of an export. `memory_bytes` is its peak and `disk_bytes` what it adds, None where it adds nothing
    worth naming; `basis` says what the seconds stand on."""

    phase: str
    forecast_s: float
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    basis: str = "this machine's speed now"


def forecast(
    plan: ExportPlan,
    speed: MachineSpeed,
    effort: Effort | None,
    compiles: bool = True,
    calibrating: MachineSpeed | None = None,
) -> list[Phase]:
    """The phases of one export in their order; validation is one where an `effort` is given. `calibrating` is the speed
    with the products of the device that calibrates, where it is another than numpy."""
    phases = []
    if nbytes := plan.opened.download_bytes:
        assumed = f"{_DOWNLOAD_RATE / 1e6:.0f} MB a second assumed"
        phases.append(Phase("download", nbytes / _DOWNLOAD_RATE, None, nbytes, assumed))
    if cost := plan.calibration_cost:
        seconds = cost.work.seconds(calibrating or speed)
        phases.append(Phase("calibrate", seconds, cost.memory_bytes, cost.disk_bytes or None))
    written = sum(plan.files.values())
    phases.append(Phase("pack", _packing(plan).seconds(speed), plan.peak_memory_bytes, written))
    if plan.compile_memory_bytes and compiles:
        seconds = compile_seconds(plan, speed, plan.recipe.context_length)
        phases.append(Phase("compile", seconds, plan.compile_memory_bytes, plan.layout.nbytes, "rates in LOG.md"))
    if effort is not None and plan.traced is not None:
        phases.append(_traced_validation(plan, speed, effort))
    elif effort is not None:
        phases.append(_validation(plan, speed, effort))
    return phases


def compile_seconds(plan: ExportPlan, speed: MachineSpeed, context_length: int) -> float:
    """Returns what compiling every part takes for a context, whichever the recipe's own is."""
    config = plan.checkpoint.config
    weights = sum(layer_bytes(plan.layout, config.num_hidden_layers))
    scores = config.num_hidden_layers * config.num_attention_heads * context_length
    parts = (_COMPILE_PART + _COMPILE_ROW * context_length) * plan.recipe.parts
    seconds = parts + _COMPILE_BYTE * weights + _COMPILE_SCORE * scores
    return seconds * TYPICAL.elements_per_s / speed.elements_per_s


def _packing(plan: ExportPlan) -> Work:
    """Reading, widening, searching and writing each weight once, on every core."""
    weights = plan.layout.weights() if plan.traced else parameter_count(plan.checkpoint.config)
    passes = 3.0 + (PASSES_TO_SEARCH if plan.precision == "int4" else 0.0)
    return Work(elements=passes * weights / (os.cpu_count() or 1), nbytes=2.0 * weights + 2.0 * plan.layout.nbytes)


def _validation(plan: ExportPlan, speed: MachineSpeed, effort: Effort) -> Phase:
    """Judging: the reference, the bundle's logits, its answers and its speed, as much of each as `sample` says."""
    recipe, config, form = plan.recipe, plan.checkpoint.config, plan.target.form
    baseline = bool(recipe.baseline if effort.baseline is None else effort.baseline)
    files = [task_file(name, recipe, plan.opened) for name in recipe.tasks] if effort.tasks else []
    counts = [*(_lines(path) for path in files), *(len(task.questions) for task in effort.own_tasks)]
    here = plan.target.accelerator.execution_provider == CPU_EP
    taken = sample(effort, config, form, baseline)
    work = validation_work(config, form, effort, counts, baseline, here)
    simulated = bool(recipe.soc) and effort.simulate is not False and plan.layout.nbytes < SIMULATED_BYTES
    seconds = work.seconds(speed)
    seconds += _SIMULATED_SECONDS * TYPICAL.elements_per_s / speed.elements_per_s if simulated else 0.0
    # onnxruntime's weights; to answer, the reference's as float32, where they fit.
    resident = 4 * parameter_count(config) if counts else 0
    memory = max(int(1.2 * plan.layout.nbytes), resident)
    return Phase("validate", seconds, memory, None, f"this machine's speed now; {_said(taken, counts)}")


def _traced_validation(plan: ExportPlan, speed: MachineSpeed, effort: Effort) -> Phase:
    """Judging a traced bundle: transformers and the bundle each read the text once."""
    weights = plan.layout.weights()
    tokens = sample(effort, plan.checkpoint.config, plan.target.form, False).tokens
    work = Work(products=2.0 * 2.0 * weights * tokens, elements=3.0 * weights)
    return Phase("validate", work.seconds(speed), 4 * weights, None, f"this machine's speed now; {tokens} tokens")


def _said(taken: Sample, counts: Sequence[int]) -> str:
    asked = [f"{min(count, taken.examples)} of {count} questions" for count in counts]
    return ", ".join([f"{taken.tokens} tokens", *asked])


def _lines(path: Path) -> int:
    """The questions of a task's file; none where there is no such file, which the judging will say."""
    try:
        return sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError):
        return 0
