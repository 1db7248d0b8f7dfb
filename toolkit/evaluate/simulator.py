"""The transformer in QNN's simulator, part after part, beside the same graphs on ORT's CPU kernels.

Each part is compiled as it is loaded and runs in a process of its own: a binary that context and iterator share cannot
be loaded from disk in the simulator, and native code of vendors may crash. T tokens, D hidden.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.apart import ChildFailed, answer, run_apart
from toolkit.bundle.settings import read_settings
from toolkit.epcontext.htp import PACKAGE, PROVIDER, htp_version, open_htp
from toolkit.errors import BundleError
from toolkit.evaluate.parity import Comparison
from toolkit.evaluate.positions import Pipeline, empty_cache
from toolkit.report.sections import Simulator
from toolkit.typed_json import Json, from_json


@dataclass(frozen=True)
class SimulatedDivergence:
    """The bundle in the simulator beside its checkpoint, on `compared_tokens` tokens."""

    compared_tokens: int
    mean_kld: float
    p999_kld: float
    reference_top1_agreement: float


@dataclass(frozen=True)
class _Run:
    """One run of the whole transformer: context or iterator, and what it is given besides hidden states and cache."""

    kind: str
    last: int
    total: int
    kept: int


@dataclass(frozen=True)
class _PartJob:
    """What the process of one part is told: its stage of each kind, the files of the hidden states `given` and `made`,
    a folder for its own files, and the runs in their order."""

    bundle: str
    stages: dict[str, str]
    given: str
    made: str
    folder: str
    runs: tuple[_Run, ...]


def simulate(
    bundle: Path,
    ids: list[int],
    prompt: int,
    reference: NDArray[np.float32],
    progress: Callable[[str], None] = lambda _: None,
) -> Simulator:
    """report.json's `simulator`: the first `prompt` of `ids` in windows, each later one by itself.

    Beside the same graphs on the CPU, `hidden_rms_error` is the rms difference of the normalized hidden states over
    their standard deviation, `top1_agreement` that of the LM head's best tokens; beside the checkpoint's logits
    `reference` [T, V] there are the figures of `simulated_divergence`. Raises MachineError if the simulator is not
    here, BundleError if it did not run a part.
    """
    version = htp_version()
    pipeline = Pipeline(bundle, exact=True)
    runs: list[_Run] = []
    hidden: list[NDArray[Any]] = []
    expected: list[NDArray[Any]] = []
    for run, kept in pipeline.stage_runs(ids, prompt):
        if names.EMBEDDED in run.feeds:
            last, total = (int(run.feeds[name].item()) for name in (names.PAST_SEQ_LEN, names.TOTAL_SEQ_LEN))
            runs.append(_Run(names.stage_kind(run.stage), last, total, kept))
            hidden.append(run.feeds[names.EMBEDDED])
        if run.output == names.LAST_HIDDEN:
            expected.append(run.hidden[:, :kept])
    parts = _parts(pipeline.placements())
    for part, stages in enumerate(parts):
        progress(f"simulate part {part + 1} of {len(parts)}")
        hidden = _run_apart(bundle, stages, runs, hidden)
    made = np.concatenate([array[:, : run.kept] for array, run in zip(hidden, runs, strict=True)], axis=1)
    on_cpu = np.concatenate(expected, axis=1)
    wide = on_cpu.astype(np.float64)
    error = np.sqrt(((made.astype(np.float64) - wide) ** 2).mean()) / wide.std()
    logits = pipeline.head(ids, made)
    agree = logits.argmax(axis=-1) == pipeline.head(ids, on_cpu).argmax(axis=-1)
    comparison = Comparison()
    comparison.add(reference, logits, ids)
    found = _divergence(comparison)
    return Simulator(
        ep=PROVIDER,
        software=f"{PACKAGE} {version}",
        stage="transformer",
        parts=len(parts),
        hidden_rms_error=float(error),
        top1_agreement=float(agree.mean()),
        tokens=len(ids),
        compared_tokens=found.compared_tokens,
        mean_kld=found.mean_kld,
        p999_kld=found.p999_kld,
        reference_top1_agreement=found.reference_top1_agreement,
    )


def simulated_divergence(
    bundle: Path, sequences: Sequence[list[int]], expected: Iterable[NDArray[np.float32]]
) -> SimulatedDivergence:
    """`mean_kld`, `p999_kld` and `reference_top1_agreement` of the bundle in the simulator, window by window, beside
    the checkpoint's logits [T, V] of each sequence; `compared_tokens` says on how many. Raises as `simulate`."""
    pipeline, comparison = Pipeline(bundle, exact=True), Comparison()
    made = simulated_hidden(bundle, pipeline, sequences)
    for ids, hidden, logits in zip(sequences, made, expected, strict=True):
        comparison.add(logits, pipeline.head(ids, hidden), ids)
    return _divergence(comparison)


def _divergence(comparison: Comparison) -> SimulatedDivergence:
    figures = comparison.figures()
    return SimulatedDivergence(comparison.tokens, figures.mean_kld, figures.p999_kld, figures.top1_agreement)


def simulated_hidden(bundle: Path, pipeline: Pipeline, sequences: Sequence[list[int]]) -> list[NDArray[Any]]:
    """Normalized hidden states [1, T, D] of each sequence, its windows through the simulator part after part.

    Sequences follow each other in one cache: what is left of the one before lies beyond what a query may look at.
    """
    runs: list[_Run] = []
    hidden: list[NDArray[Any]] = []
    for ids in sequences:
        for embedded, last, kept in pipeline.windows(ids):
            runs.append(_Run(names.CONTEXT, last, pipeline.context_length, kept))
            hidden.append(embedded)
    for stages in _parts(pipeline.placements()):
        hidden = _run_apart(bundle, {names.CONTEXT: stages[names.CONTEXT]}, runs, hidden)
    rows = iter(zip(hidden, runs, strict=True))
    made = []
    for ids in sequences:
        pieces, length = [], 0
        while length < len(ids):
            array, run = next(rows)
            pieces.append(array[:, : run.kept])
            length += run.kept
        made.append(np.concatenate(pieces, axis=1))
    return made


def _parts(stages: Iterable[str]) -> list[dict[str, str]]:
    """By part, the stage of each kind."""
    stages = list(stages)
    contexts = [stage for stage in stages if names.stage_kind(stage) == names.CONTEXT]
    iterators = [stage for stage in stages if names.stage_kind(stage) == names.ITERATOR]
    return [{names.CONTEXT: c, names.ITERATOR: i} for c, i in zip(contexts, iterators, strict=True)]


def _run_apart(
    bundle: Path, stages: dict[str, str], runs: list[_Run], hidden: list[NDArray[Any]]
) -> list[NDArray[Any]]:
    """The hidden states that one part makes of `hidden`, each run's [1, S, D]."""
    with tempfile.TemporaryDirectory() as folder:
        given, taken = Path(folder) / "given.npz", Path(folder) / "made.npz"
        np.savez(given, *hidden)
        job = _PartJob(str(bundle), stages, str(given), str(taken), folder, tuple(runs))
        try:
            run_apart("toolkit.evaluate.simulator", job)
        except ChildFailed as failed:
            what = " and ".join(stages.values())
            raise BundleError(f"{PACKAGE} did not simulate {what} of {bundle}: {failed.reason}") from None
        with np.load(taken) as arrays:
            return [arrays[name] for name in arrays.files]


def _run_part(raw: Json) -> None:
    """In the child: context over its runs, then iterator with the cache they left."""
    job = from_json(_PartJob, raw, "the job")
    bundle, options = Path(job.bundle), read_settings(Path(job.bundle)).soc_options()
    with np.load(job.given) as arrays:
        hidden = [arrays[name] for name in arrays.files]
    cache: dict[str, NDArray[Any]] = {}
    made = []
    for kind, stage in job.stages.items():
        runs = [(array, run) for array, run in zip(hidden, job.runs, strict=True) if run.kind == kind]
        if not runs:
            continue
        session = open_htp(bundle / names.stage_file(stage), options, {}, Path(job.folder))
        cache = cache or empty_cache(session)
        (entry,) = [value.name for value in session.get_inputs() if len(value.shape) == 3]
        outputs = [value.name for value in session.get_outputs()]
        for array, run in runs:
            feeds = {entry: array, **cache, names.PAST_SEQ_LEN: np.array([[run.last]], np.int32)}
            feeds[names.TOTAL_SEQ_LEN] = np.array([run.total], np.int32)
            out = dict(zip(outputs, session.run(None, feeds), strict=True))
            cache = {name: out.pop(names.present_of(name)) for name in cache}
            made.append(next(iter(out.values())))
        del session
    np.savez(job.made, *made)


if __name__ == "__main__":
    answer(_run_part)
