"""The transformer in its vendor's simulator, beside the checkpoint: the report's `simulator`."""

from __future__ import annotations

from typing import Any, Final

from toolkit import names
from toolkit.epcontext.htp import htp_version
from toolkit.errors import MachineError
from toolkit.evaluate.answers import Asked, first_of, simulated_answers
from toolkit.evaluate.parity import matching_prefix
from toolkit.evaluate.simulated_loop import simulated_continuations
from toolkit.evaluate.simulator import simulate, simulated_divergence
from toolkit.pipeline.judge.answers import ReferenceAnswers, task_row
from toolkit.pipeline.judge.subject import GREEDY_PROMPT, Subject
from toolkit.reference.decoder import head_logits, reference_hidden
from toolkit.report.sections import NotMeasured

# Tokens made through onnxruntime-genai with the transformer in the simulator.
_SIMULATED_NEW: Final = 8
# The simulator takes seconds a token at the width of the 1.5B, so a larger transformer is simulated on request.
_SIMULATED_BYTES: Final = 64 << 20


def run_simulator(subject: Subject) -> dict[str, Any] | NotMeasured | None:
    """The section, or why there is none; None for a target without a simulator."""
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
    config, source = subject.checkpoint.config, subject.checkpoint.source
    windows, decoded = (1, 1) if large else (2, 8)
    cut = [token for ids in subject.sequences for token in ids][: windows * recipe.window + decoded]
    logits = head_logits(config, source, reference_hidden(config, source, [cut])[0])
    section = simulate(subject.bundle, cut, max(len(cut) - decoded, 1), logits, subject.progress)
    if subject.effort.simulated_tokens:
        section |= _divergence(subject)
    return section if large else section | _greedy(subject, cut[:GREEDY_PROMPT])


def simulated_task_rows(
    subject: Subject, tasks: list[Asked], reference: ReferenceAnswers
) -> list[dict[str, Any]] | NotMeasured:
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
    return rows


def _is_large(subject: Subject) -> bool:
    data = subject.bundle / names.TRANSFORMER_DATA_FILE
    return not data.is_file() or data.stat().st_size > _SIMULATED_BYTES


def _divergence(subject: Subject) -> dict[str, Any]:
    """The divergence from the checkpoint on as many tokens as were asked for."""
    first = _first_tokens(subject.sequences, subject.effort.simulated_tokens)
    subject.progress(f"{sum(map(len, first))} tokens in the simulator")
    config, source = subject.checkpoint.config, subject.checkpoint.source
    expected = (head_logits(config, source, hidden) for hidden in reference_hidden(config, source, first))
    return simulated_divergence(subject.bundle, first, expected)


def _greedy(subject: Subject, prompt: list[int]) -> dict[str, Any]:
    """How many greedy tokens through onnxruntime-genai are the checkpoint's."""
    subject.progress("greedy tokens through onnxruntime-genai in the simulator")
    (made,) = simulated_continuations(subject.bundle, [prompt], _SIMULATED_NEW)
    config, source = subject.checkpoint.config, subject.checkpoint.source
    hidden = reference_hidden(config, source, [prompt + made])[0]
    best = head_logits(config, source, hidden[len(prompt) - 1 : -1]).argmax(axis=-1)
    return {"greedy_match_tokens": matching_prefix(best.tolist(), made), "greedy_tokens": len(made)}


def _first_tokens(sequences: list[list[int]], tokens: int) -> list[list[int]]:
    """As many sequences as hold `tokens` tokens, the last one cut."""
    starts = [sum(map(len, sequences[:k])) for k in range(len(sequences))]
    return [ids[: tokens - start] for ids, start in zip(sequences, starts, strict=True) if start < tokens]
