"""The transformer in its vendor's simulator, beside the checkpoint: the report's `simulator`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from toolkit import names
from toolkit.epcontext.htp import htp_version
from toolkit.errors import MachineError
from toolkit.evaluate.answers import Asked, first_of, simulated_answers
from toolkit.evaluate.simulated_loop import simulated_continuations
from toolkit.evaluate.simulator import SimulatedDivergence, simulate, simulated_divergence
from toolkit.pipeline.judge.answers import ReferenceAnswers, task_row
from toolkit.pipeline.judge.reference import Reference
from toolkit.pipeline.judge.runtime import Greedy
from toolkit.pipeline.judge.subject import GREEDY_PROMPT, Subject
from toolkit.reference.decoder import Array
from toolkit.report.sections import NotMeasured, Simulator, TaskRow

# Tokens made through onnxruntime-genai with the transformer in the simulator.
_SIMULATED_NEW: Final = 8
# The simulator takes seconds a token at the width of the 1.5B, so a larger transformer is simulated on request.
SIMULATED_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class Simulation:
    """What goes through the simulator: `cut` of the text, of which the last `decoded` ids each by itself; and the
    `greedy` continuation that was made in it, where the transformer is small."""

    cut: list[int]
    decoded: int
    greedy: Greedy | None

    @property
    def sequences(self) -> list[list[int]]:
        """What the checkpoint's logits are wanted of."""
        return [self.cut, *([self.greedy.prompt + self.greedy.made] if self.greedy else [])]


def plan_simulation(subject: Subject) -> Simulation | NotMeasured | None:
    """What to simulate, or why nothing is; None for a target without a simulator."""
    wanted, recipe = subject.effort.simulate, subject.manifest.recipe
    if not recipe.soc:
        return None
    large = _is_large(subject)
    if wanted is False:
        return NotMeasured("simulator", "left out by --no-simulate")
    if wanted is None and large:
        return NotMeasured("simulator", "takes long at this size: --simulate")
    try:
        htp_version()
    except MachineError as problem:
        return NotMeasured("simulator", str(problem))
    windows, decoded = (1, 1) if large else (2, 8)
    cut = [token for ids in subject.sequences for token in ids][: windows * recipe.window + decoded]
    return Simulation(cut, decoded, None if large else _greedy(subject, cut[:GREEDY_PROMPT]))


def run_simulation(
    subject: Subject, simulation: Simulation, reference: Reference, logits: Sequence[Array]
) -> Simulator:
    """The section; `logits` are the checkpoint's of the simulation's sequences."""
    cut = simulation.cut
    section = simulate(subject.bundle, cut, max(len(cut) - simulation.decoded, 1), logits[0], subject.progress)
    if subject.effort.simulated_tokens:
        section = replace(section, **vars(_divergence(subject, reference)))
    if simulation.greedy is None:
        return section
    matched = simulation.greedy.matching(logits[1])
    return replace(section, greedy_match_tokens=matched, greedy_tokens=len(simulation.greedy.made))


def simulated_task_rows(
    subject: Subject, tasks: list[Asked], reference: ReferenceAnswers
) -> tuple[TaskRow, ...] | NotMeasured:
    """The first questions of each task, answered in the simulator; or that none were asked."""
    count = subject.effort.simulated_examples
    if not count:
        return NotMeasured("simulator.tasks", "slow: ask some questions in the simulator with --simulate-examples")
    rows = []
    for asked in tasks:
        some = first_of(asked, count)
        subject.progress(f"task {asked.task.name}: {len(some.ids)} questions in the simulator")
        theirs = reference.to(asked, subject)
        ours = simulated_answers(subject.bundle, some)
        rows.append(task_row(some, ours, theirs.first(len(some.ids)) if theirs else None))
    return tuple(rows)


def _is_large(subject: Subject) -> bool:
    data = subject.bundle / names.TRANSFORMER_DATA_FILE
    return not data.is_file() or data.stat().st_size > SIMULATED_BYTES


def _divergence(subject: Subject, reference: Reference) -> SimulatedDivergence:
    """The divergence from the checkpoint on as many tokens as were asked for."""
    first = _first_tokens(subject.sequences, subject.effort.simulated_tokens)
    subject.progress(f"{sum(map(len, first))} tokens in the simulator")
    # A position sees none after it, so those of a cut sequence are the whole one's.
    expected = (logits[: len(ids)] for ids, (logits, _) in zip(first, reference.text(), strict=False))
    return simulated_divergence(subject.bundle, first, expected)


def _greedy(subject: Subject, prompt: list[int]) -> Greedy:
    """What onnxruntime-genai makes of a prompt with the transformer in the simulator."""
    subject.progress("greedy tokens through onnxruntime-genai in the simulator")
    (made,) = simulated_continuations(subject.bundle, [prompt], _SIMULATED_NEW)
    return Greedy(prompt, made)


def _first_tokens(sequences: list[list[int]], tokens: int) -> list[list[int]]:
    """As many sequences as hold `tokens` tokens, the last one cut."""
    starts = [sum(map(len, sequences[:k])) for k in range(len(sequences))]
    return [ids[: tokens - start] for ids, start in zip(sequences, starts, strict=True) if start < tokens]
