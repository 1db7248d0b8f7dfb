"""Logits of every position from a bundle's own graphs, through ORT on the CPU: what ships, judged token by token.

T tokens, S query length, D hidden, V vocab.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from toolkit import names
from toolkit.bundle.settings import read_settings
from toolkit.errors import BundleError

_NUMPY: Final[dict[str, type[np.number[Any]]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}
_KINDS: Final = (names.CONTEXT, names.ITERATOR)
# As many positions before the last as no text has.
_ALL_BEFORE: Final = np.array([1 << 31], np.int64)
_Values = dict[str, NDArray[Any]]


class Positions(Protocol):
    """A bundle opened so that it gives the logits of every position, not of the last alone."""

    def placements(self) -> dict[str, dict[str, int]]:
        """Returns, by stage and execution provider, how many nodes run there, as ORT assigned them after its own
        fusions."""

    def logits(self, ids: list[int], prompt: int | None = None) -> NDArray[np.float32]:
        """Returns [T, V] for one sequence: the first `prompt` tokens (default all) as a prompt, each later one with the
        cache."""


def open_positions(bundle: Path, exact: bool = False, threads: int = 0) -> Positions:
    """Opens the bundle's graphs on the CPU. `exact` keeps activations as they are where the bundle rounds them to int8,
    so that a graph's errors stand apart from rounding; `threads` are those of each graph, 0 for one a core.

    Raises BundleError for a folder without the graphs its genai_config.json names.
    """
    opened = Pipeline if read_settings(bundle).is_pipeline else OneGraph
    return opened(bundle, exact, threads)


def rounds_activations(bundle: Path) -> bool:
    """Returns whether any graph of a bundle lets a product round its input to int8 (accuracy_level 4)."""
    return any(
        attribute.name == "accuracy_level" and attribute.i == 4
        for path in bundle.glob("*.onnx")
        for node in onnx.load(path, load_external_data=False).graph.node
        for attribute in node.attribute
    )


class OneGraph:
    """One model with the last-position gather bypassed in memory."""

    def __init__(self, bundle: Path, exact: bool = False, threads: int = 0) -> None:
        self._session = _session(bundle, names.MODEL, exact, threads)
        self._has_positions = any(value.name == names.POSITION_IDS for value in self._session.get_inputs())

    def placements(self) -> dict[str, dict[str, int]]:
        """Returns how many nodes of each graph every provider took, as Positions says."""
        return {names.MODEL: placement(self._session)}

    def logits(self, ids: list[int], prompt: int | None = None) -> NDArray[np.float32]:
        """Returns [T, V] of every position of a sequence, as Positions says."""
        stops = [len(ids)] if prompt is None else [prompt, *range(prompt + 1, len(ids) + 1)]
        cache = empty_cache(self._session, 0)
        pieces, start = [], 0
        for stop in stops:
            tokens = {
                names.INPUT_IDS: np.array([ids[start:stop]], np.int64),
                names.ATTENTION_MASK: np.ones((1, stop), np.int64),
            }
            if self._has_positions:
                tokens[names.POSITION_IDS] = np.arange(start, stop, dtype=np.int64)[None]
            made = _run(self._session, {**tokens, **cache})
            pieces.append(made[names.LOGITS][0].astype(np.float32, copy=False))
            cache = _grown(cache, made)
            start = stop
        # Logits are most of what there is to copy.
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True)
class StageRun:
    """One run of one transformer stage: what it is fed, and the hidden states it makes of that, by their name."""

    stage: str
    feeds: _Values
    output: str
    hidden: NDArray[Any]


class Pipeline:
    """The stages as onnxruntime-genai drives them: the prompt in padded windows, then a token at a time.

    The graphs are the uncompiled ones, whichever the settings name. Raises BundleError where a stage is missing.
    """

    def __init__(self, bundle: Path, exact: bool = False, threads: int = 0) -> None:
        settings = read_settings(bundle)
        kinds = {names.stage_kind(stage.name) for stage in settings.stages}
        if missing := {names.EMBEDDINGS, *_KINDS, names.HEAD} - kinds:
            raise BundleError(f"{bundle} has no stage {min(missing)}: see `toolkit check {bundle}`")
        self._sessions = {stage.name: _session(bundle, stage.name, exact, threads) for stage in settings.stages}
        self._window, self._pad_token_id = settings.window, settings.pad_token_id
        self.context_length = settings.context_length

    def placements(self) -> dict[str, dict[str, int]]:
        """Returns how many nodes of each graph every provider took, as Positions says."""
        return {stage: placement(session) for stage, session in self._sessions.items()}

    def logits(self, ids: list[int], prompt: int | None = None) -> NDArray[np.float32]:
        """Returns [T, V] of every position of a sequence, as Positions says."""
        hidden = [run.hidden[:, :kept] for run, kept in self.stage_runs(ids, prompt) if run.output == names.LAST_HIDDEN]
        return self.head(ids, np.concatenate(hidden, axis=1))

    def head(self, ids: list[int], hidden: NDArray[Any]) -> NDArray[np.float32]:
        """Logits [T, V] of normalized hidden states [1, T, D]."""
        given = {names.LAST_HIDDEN: hidden, names.INPUT_IDS: np.array([ids], np.int64)}
        logits: NDArray[np.float32] = _run(self._sessions[names.HEAD], given)[names.LOGITS][0]
        return logits

    def windows(self, ids: list[int]) -> Iterator[tuple[NDArray[Any], int, int]]:
        """Returns what a context stage is given of a sequence: embedded tokens [1, S, D], padded at the end of the
        last, the position of their last, and how many are no pads."""
        for start in range(0, len(ids), self._window):
            chunk = ids[start : start + self._window]
            padded = chunk + [self._pad_token_id] * (self._window - len(chunk))
            given = {names.INPUT_IDS: np.array([padded], np.int64)}
            embedded = _run(self._sessions[names.EMBEDDINGS], given)[names.EMBEDDED]
            yield embedded, start + self._window - 1, len(chunk)

    def stage_runs(self, ids: list[int], prompt: int | None = None) -> Iterator[tuple[StageRun, int]]:
        """Yields each run of a transformer stage with how many of its positions are no pads: the first `prompt` ids
        (default all) in windows, each later one by itself."""
        prompt = len(ids) if prompt is None else prompt
        length = self._cache_length(prompt, len(ids))
        kinds = {kind: [s for s in self._sessions if names.stage_kind(s) == kind] for kind in _KINDS}
        cache = self._empty_cache(kinds[names.CONTEXT], length)
        for start in range(0, prompt, self._window):
            chunk = ids[start : min(start + self._window, prompt)]
            padded = chunk + [self._pad_token_id] * (self._window - len(chunk))
            for run in self._through(kinds[names.CONTEXT], padded, start + self._window - 1, length, cache):
                yield run, len(chunk)
        for position in range(prompt, len(ids)):
            for run in self._through(kinds[names.ITERATOR], [ids[position]], position, length, cache):
                yield run, 1

    def _through(self, stages: list[str], ids: list[int], last: int, length: int, cache: _Values) -> Iterator[StageRun]:
        """Runs the transformer's parts one after the other and yields the run of each; `cache` is changed in place, and
        `last` is the position of the last id."""
        values = {
            **_run(self._sessions[names.EMBEDDINGS], {names.INPUT_IDS: np.array([ids], np.int64)}),
            names.PAST_SEQ_LEN: np.array([[last]], np.int32),
            names.TOTAL_SEQ_LEN: np.array([length], np.int32),
        }
        for stage in stages:
            session = self._sessions[stage]
            feeds = {value.name: {**values, **cache}[value.name] for value in session.get_inputs()}
            made = _run(session, feeds)
            cache |= _grown({name: array for name, array in feeds.items() if name in cache}, made)
            (output,) = [name for name in made if not names.is_present(name)]
            values[output] = made[output]
            yield StageRun(stage, feeds, output, made[output])

    def _cache_length(self, prompt: int, tokens: int) -> int:
        """The context where the graph fixes it, else as much as the windows and the tokens after them take."""
        session = next(s for stage, s in self._sessions.items() if names.stage_kind(stage) == names.CONTEXT)
        fixed = _cache_inputs(session)[0].shape[2]
        needed = -(-prompt // self._window) * self._window + tokens - prompt
        return fixed if isinstance(fixed, int) else needed

    def _empty_cache(self, stages: list[str], length: int) -> _Values:
        return {name: zero for stage in stages for name, zero in empty_cache(self._sessions[stage], length).items()}


def some_ids(bundle: Path, extra: int) -> list[int]:
    """Returns seeded random ids, none of them the pad: one window and `extra` more."""
    settings = read_settings(bundle)
    below = settings.pad_token_id or settings.vocab_size
    return [int(i) for i in np.random.default_rng(0).integers(0, below, settings.window + extra)]


def placement(session: ort.InferenceSession) -> dict[str, int]:
    """Nodes by the execution provider ORT gave them to; the session must have been told to record it."""
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += len(part.get_nodes())
    return dict(counts)


def exact_graph(bundle: Path, stage: str) -> onnx.ModelProto:
    """Returns a stage's graph, weights included, that gives the logits of every position and rounds no activation."""
    model = _graph(bundle, stage, exact=True)
    onnx.load_external_data_for_model(model, str(bundle))
    return model


def _session(bundle: Path, stage: str, exact: bool, threads: int) -> ort.InferenceSession:
    model = _graph(bundle, stage, exact)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle))
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    # Or ORT fuses int4 weights and their product into one that rounds its input to int8, which no NPU does.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _graph(bundle: Path, stage: str, exact: bool) -> onnx.ModelProto:
    path = bundle / names.stage_file(stage)
    if not path.is_file():
        raise BundleError(f"{bundle} has no {path.name}: not a bundle this command can judge")
    model = onnx.load(path, load_external_data=False)
    nodes = {node.name: node for node in model.graph.node}
    if names.LAST_POSITION_GATHER in nodes:
        _bypass_gather(model, nodes)
    for initializer in model.graph.initializer:
        if initializer.name == names.LAST_ROWS_BEFORE:
            initializer.CopyFrom(onnx.numpy_helper.from_array(_ALL_BEFORE, initializer.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if exact and attribute.name == "accuracy_level":
                attribute.i = 1
    return model


def _bypass_gather(model: onnx.ModelProto, nodes: dict[str, onnx.NodeProto]) -> None:
    """The head over all positions rather than the last."""
    hidden = nodes[names.LAST_POSITION_GATHER].input[0]
    last = nodes[names.LAST_POSITION_UNSQUEEZE].output[0]
    for node in model.graph.node:
        if last in node.input and node.name != names.LAST_POSITION_UNSQUEEZE:
            node.input[list(node.input).index(last)] = hidden
    logits = next(value for value in model.graph.output if value.name == names.LOGITS)
    logits.type.tensor_type.shape.dim[1].dim_param = "sequence"


def _cache_inputs(session: ort.InferenceSession) -> list[Any]:
    return [value for value in session.get_inputs() if names.is_past(value.name)]


def empty_cache(session: ort.InferenceSession, length: int | None = None) -> dict[str, NDArray[Any]]:
    """Returns zeros of [1, kv heads, length, head_dim] for each cache input, as long as the graph fixes it for None,
    and of a state's own shape."""
    made = {}
    for value in _cache_inputs(session):
        if names.is_state(value.name):
            made[value.name] = np.zeros((1, *value.shape[1:]), _NUMPY[value.type])
            continue
        _, heads, fixed, width = value.shape
        made[value.name] = np.zeros(
            (1, int(heads), fixed if length is None else length, int(width)), _NUMPY[value.type]
        )
    return made


def _grown(cache: _Values, made: _Values) -> _Values:
    """The cache that a run gave back, under its names for the next."""
    return {past: made[names.present_of(past)] for past in cache}


def _run(session: ort.InferenceSession, feeds: _Values) -> _Values:
    made = session.run(None, feeds)
    return {value.name: np.asarray(array) for value, array in zip(session.get_outputs(), made, strict=True)}
