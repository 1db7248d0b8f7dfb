"""The calibration story: text through the model, then formats, folds and, for GPTQ, solved matrices."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.bundle.manifest import CalibrationText
from toolkit.calibrate.ahead import Ahead, one_ahead
from toolkit.calibrate.exact import ExactInputs
from toolkit.calibrate.experts import expert_tokens
from toolkit.calibrate.facts import Survey
from toolkit.calibrate.input_solver import Fallback, Problem
from toolkit.calibrate.ladder import SharedFormat, spend_budget
from toolkit.calibrate.ranges import activation_ranges
from toolkit.calibrate.solve import Solver, Writer, solve
from toolkit.calibrate.survey import Surveyed, Wish, layers_surveyed, shared_formats, survey, survey_by_layers
from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.folded import FoldedTensors
from toolkit.checkpoint.remembered import LastReader, RememberedWeights
from toolkit.checkpoint.weights import WeightSource, expected_tensors
from toolkit.device.arrays import NUMPY
from toolkit.device.fitting import ON_NUMPY, Fitting
from toolkit.device.memory import kept_memory
from toolkit.errors import RecipeError
from toolkit.files import file_sha256
from toolkit.graph.layout import plan_layout
from toolkit.partition.data_files import Destination
from toolkit.partition.solved import open_solved
from toolkit.partition.stored import StoredTensors
from toolkit.pipeline.calibration_cost import calibration_tokens, remembers, solves_in_step, wide_tokens
from toolkit.pipeline.plan import ExportPlan
from toolkit.pipeline.text import LONGEST, find_text, token_sequences
from toolkit.quality import QUALITIES
from toolkit.quant.activations import Rounding
from toolkit.quant.blockwise import QuantSpec
from toolkit.quant.formats import floats_of, planned_specs
from toolkit.quant.ranges import ActivationRange
from toolkit.recipe import Recipe
from toolkit.report.weight_sections import ActivationRanges, CalibrationOutcome, FallbackRow, Fold
from toolkit.speculation import MTP
from toolkit.target import CPU_FORM, Form

Floats = NDArray[np.float32]
# Fewer say nothing about a channel.
_FEWEST_TOKENS: Final = 256


@dataclass(frozen=True)
class TokenizedText:
    """A calibrated recipe's text as sequences of token ids, and what the manifest says of it."""

    sequences: list[list[int]]
    origin: CalibrationText


@dataclass(frozen=True)
class Calibrated:
    """A plan with its final formats and folded weights, the importance of columns by tensor, and what the report says
    of it."""

    plan: ExportPlan
    importance: Mapping[str, Floats]
    section: CalibrationOutcome


@dataclass(frozen=True)
class StoredRanges:
    """The ranges of uint16 activations by point, what the report says of them, and how many bytes of the data files
    were read."""

    ranges: dict[str, ActivationRange]
    section: CalibrationOutcome
    packed_bytes_read: int


def calibrate(
    plan: ExportPlan,
    text: TokenizedText,
    partial: Path,
    work: Path,
    progress: Callable[[str], None] = lambda _: None,
    fitting: Fitting = ON_NUMPY,
) -> Calibrated:
    """Runs the text through the checkpoint and decides how each matrix is stored; `work` holds what is
    finished, solved matrices go into the data files in `partial`.

    Raises NonFiniteError for activations that are not numbers.
    """
    specs = planned_specs(plan.checkpoint.config, plan.recipe, plan.target.form)
    passes = _Passes(plan, text.sequences, specs, partial, work, progress, fitting)
    with kept_memory():
        return _weights(plan, specs, passes, _read_text(plan, text))


def stored_ranges(
    plan: ExportPlan,
    text: TokenizedText,
    partial: Path,
    work: Path,
    progress: Callable[[str], None] = lambda _: None,
    fitting: Fitting = ON_NUMPY,
) -> StoredRanges:
    """The ranges from the text through the weights packed in `partial`; `work` holds what is finished.

    Raises NonFiniteError or UnsupportedError for activations that cannot be stored.
    """
    start, percentile = time.perf_counter(), plan.recipe.activation_percentile
    stored = StoredTensors(plan.layout, partial)
    config, folder = plan.checkpoint.config, work / "ranges"
    ranges = activation_ranges(config, stored, text.sequences, percentile, folder, progress, fitting)
    described = ActivationRanges("uint16", len(ranges), percentile)
    seconds = time.perf_counter() - start
    section = replace(_read_text(plan, text), activations=described, ranges_s=seconds)
    return StoredRanges(ranges, section, stored.bytes_read)


def _read_text(plan: ExportPlan, text: TokenizedText) -> CalibrationOutcome:
    """What was read, and nothing made of it yet."""
    return CalibrationOutcome(plan.recipe.quality, text.origin.name, sum(map(len, text.sequences)))


def _weights(plan: ExportPlan, specs: Mapping[str, QuantSpec], passes: _Passes, read: CalibrationOutcome) -> Calibrated:
    """The plan with its final formats and folded weights, the importance of columns, and what there is to report."""
    start = time.perf_counter()
    recipe, checkpoint, config = plan.recipe, plan.checkpoint, plan.checkpoint.config
    if solves_in_step(recipe, config, plan.target.form):
        found, fallbacks, formats = *passes.together(), specs
    else:
        found = passes.surveyed()
        formats, fallbacks = _formats(plan, specs, found), []
    layout = plan_layout(config, plan.target, recipe, formats)
    graphs = {name: nbytes for name, nbytes in plan.files.items() if name not in plan.layout.files}
    plan = replace(
        plan,
        checkpoint=replace(checkpoint, source=passes.folded(checkpoint.source, found)),
        layout=layout,
        files={**graphs, **layout.files},
        bits_per_weight=layout.bits_per_weight(),
    )
    if not passes.solving_s and _solves(formats):
        fallbacks = passes.solved(plan, formats, found)
    decided = _decided(read, recipe, found, fallbacks)
    surveying_s = time.perf_counter() - start - passes.solving_s
    took = replace(decided, survey_s=surveying_s, solve_s=passes.solving_s)
    return Calibrated(plan, _importance(config, found), took)


class _Passes:
    """The survey and the solver over one plan's text; `solving_s` is what the solver has taken."""

    def __init__(
        self,
        plan: ExportPlan,
        sequences: list[list[int]],
        specs: Mapping[str, QuantSpec],
        partial: Path,
        work: Path,
        progress: Callable[[str], None],
        fitting: Fitting,
    ) -> None:
        self._plan, self._sequences, self._specs = plan, sequences, specs
        self._partial, self._work, self._progress, self._fitting = partial, work, progress, fitting
        self._config, recipe, source = plan.checkpoint.config, plan.recipe, plan.checkpoint.source
        kept = remembers(recipe, self._config, plan.target.form)
        self._source: WeightSource = RememberedWeights(source) if kept else source
        rounding = _rounding(plan.target.form)
        folds_head = recipe.speculation != MTP  # what the final norm gives is its MTP head's too
        self._wish = Wish(specs, rounding, _rounding(CPU_FORM), recipe.fold, recipe.bits_per_weight > 0, folds_head)
        self.solving_s = 0.0

    def surveyed(self) -> Survey:
        """The survey alone, for what is decided by it."""
        folder, fitting = self._work / "survey", self._fitting
        return survey(self._config, self._source, self._sequences, self._wish, folder, self._progress, fitting)

    def together(self) -> tuple[Survey, list[Fallback]]:
        """Each layer surveyed, then solved, so that it is read once; for formats that stand beforehand."""
        source, found = RememberedWeights(self._plan.checkpoint.source), Survey({}, {}, 0)
        with open_solved(Destination(self._plan.layout, self._partial)) as writer:
            kept, solver = self._in_step(writer)
            with self._surveyed_ahead(source, kept) as surveyed:
                begin_next = surveyed.begin_next if isinstance(surveyed, Ahead) else _nothing
                for done in surveyed:
                    found = done.found
                    if done.step:
                        self._progress(done.step)
                    with self._solving():
                        while solver.layers < done.layers:
                            weights = self.folded(LastReader(source), found)
                            solver.layer(weights, self._problem(self._specs, found), begin_next)
                            self._progress(f"solved layer {solver.layers - 1}")
            source.forget()
            with self._solving():
                weights = self.folded(self._plan.checkpoint.source, found)
                fallbacks = solver.head(weights, self._problem(self._specs, found))
                self._progress("solved head")
        return found, fallbacks

    @contextmanager
    def _solving(self) -> Iterator[None]:
        """Counts the seconds to what the solver has taken."""
        start = time.perf_counter()
        yield
        self.solving_s += time.perf_counter() - start

    def _surveyed_ahead(self, source: WeightSource, kept: ExactInputs) -> AbstractContextManager[Iterable[Surveyed]]:
        """Gives what is found layer by layer; on numpy the next layer is surveyed meanwhile, by a pool once most of it
        would wait. A GPU does one thing after the other, and has no memory for two layers."""
        config, texts, wish, folder = self._config, self._sequences, self._wish, self._work / "survey"
        if self._fitting.on is not NUMPY:
            return nullcontext(survey_by_layers(config, source, texts, wish, folder, self._fitting, kept))
        behind = self._fitting.behind()
        making = partial(survey_by_layers, config, source, texts, wish, folder, behind, kept)
        return one_ahead(making, waits=self._fitting.pool is not None)

    def solved(self, plan: ExportPlan, formats: Mapping[str, QuantSpec], found: Survey) -> list[Fallback]:
        """Every matrix of a plan with its final layout, after the survey."""
        with self._solving(), open_solved(Destination(plan.layout, self._partial)) as writer:
            return solve(
                self._config,
                self.folded(self._source, found),
                self._sequences,
                self._problem(formats, found),
                writer,
                self._work / "solve",
                self._progress,
                self._fitting,
            )

    def _in_step(self, writer: Writer) -> tuple[ExactInputs, Solver]:
        """What the survey keeps, and a solver that it is kept for. Both go on where they were stopped if the solver is
        given what it lacks, else from the start."""
        lengths, names_of = [len(ids) for ids in self._sequences], ("survey", "solve", "exact")

        def begun() -> tuple[ExactInputs, Solver]:
            kept = ExactInputs(self._work / "exact", lengths)
            return kept, Solver(self._config, self._sequences, writer, self._work / "solve", self._fitting, kept)

        kept, solver = begun()
        surveyed = layers_surveyed(self._config, lengths, self._work / "survey")
        between = decoder_of(self._config).layers[solver.layers : surveyed]
        if solver.layers <= surveyed and kept.has(
            given for layer in between for given in layer.inputs if not given.routed
        ):
            return kept, solver
        for name in names_of:
            shutil.rmtree(self._work / name, ignore_errors=True)
        return begun()

    def folded(self, source: WeightSource, found: Survey) -> FoldedTensors:
        """The checkpoint with what is folded so far."""
        return FoldedTensors(source, decoder_of(self._config).inputs, found.scales())

    def _problem(self, formats: Mapping[str, QuantSpec], found: Survey) -> Problem:
        values = {name: facts.values for name, facts in found.inputs.items()}
        importance = _importance(self._config, found)
        wish, recipe = self._wish, self._plan.recipe
        return Problem(
            formats,
            importance,
            wish.rounding,
            wish.head_rounding,
            values,
            found.scales(),
            QUALITIES[recipe.quality].revisits,
            wide_tokens(recipe),
        )


def _nothing() -> None:
    """Begins nothing: what comes next is made when it is asked for."""


def _solves(formats: Mapping[str, QuantSpec]) -> bool:
    return any(spec.rounded_by.solves for spec in formats.values())


def _importance(config: ModelConfig, found: Survey) -> dict[str, Floats]:
    """Second moments of the columns of every matrix whose input was seen, by tensor."""
    return {
        names.weight(reader): found.inputs[given.name].importance
        for given in decoder_of(config).inputs
        if given.name in found.inputs
        for reader in given.readers
    }


def calibration_text(plan: ExportPlan) -> TokenizedText:
    """The text of a plan that reads one, tokenized.

    Raises RecipeError if it cannot be read or holds less than was asked for, CheckpointError if it holds no text.
    """
    recipe, checkpoint = plan.recipe, plan.checkpoint
    path = find_text(recipe.calibration, recipe.name, recipe.target, checkpoint)
    origin = _described(path, checkpoint.synthetic)
    wanted = calibration_tokens(recipe, checkpoint.config)
    sequences = token_sequences(checkpoint, path, wanted, LONGEST)
    found = sum(map(len, sequences))
    needed = recipe.calibration_tokens or _FEWEST_TOKENS
    if found < needed:
        raise RecipeError(
            f"{path} holds {found} tokens of calibration text, at least {needed} are needed: name a longer text with "
            "--calibration"
        )
    return TokenizedText(sequences, origin)


def _described(path: Path, synthetic: bool) -> CalibrationText:
    """Name and SHA-256 of a text; random weights are calibrated on random ids."""
    if synthetic:
        return CalibrationText("random ids")
    try:
        return CalibrationText(path.name, file_sha256(path))
    except OSError as problem:
        raise RecipeError(f"calibration text {path} cannot be read: {problem.strerror}") from None


def _formats(plan: ExportPlan, specs: Mapping[str, QuantSpec], found: Survey) -> dict[str, QuantSpec]:
    """The rules' formats, or what the budget buys."""
    recipe, config, form = plan.recipe, plan.checkpoint.config, plan.target.form
    if not recipe.bits_per_weight:
        return dict(specs)

    def taken(shared: SharedFormat, spec: QuantSpec) -> bool:
        outside = names.role_of(shared.tensors[0]) in names.OUTSIDE_ROLES
        return spec.bits == 4 or spec == shared.spec or outside or form.wide_bits

    choices = [
        replace(shared, losses={spec: loss for spec, loss in shared.losses.items() if taken(shared, spec)})
        for shared in shared_formats(config, specs, expected_tensors(config), found)
    ]
    return spend_budget(choices, recipe.bits_per_weight, lambda tensor: floats_of(tensor, form))


def _rounding(form: Form) -> Rounding:
    """What a bundle of this form does to the input of a linear."""
    if form.qdq:
        return Rounding.UINT16
    return Rounding.INT8 if form.accuracy_level == 4 else Rounding.NONE


def _decided(made: CalibrationOutcome, recipe: Recipe, found: Survey, fallbacks: list[Fallback]) -> CalibrationOutcome:
    """What the text decided: folds, the matrices that could not be solved, and what a budget was spent by."""
    folds = [
        Fold(name, fold.alpha, fold.beta, fold.plain_loss, fold.loss)
        for name, fold in ((name, facts.fold) for name, facts in found.inputs.items())
        if fold.scales is not None
    ]
    return replace(
        made,
        inputs=len(found.inputs),
        folded=tuple(folds),
        fallbacks=tuple(FallbackRow(row.tensor, row.reason) for row in fallbacks),
        experts=expert_tokens(found.inputs),
        budget_bits_per_weight=recipe.bits_per_weight or None,
        divergences=found.divergences if recipe.bits_per_weight else None,
    )
