"""What is judged: a bundle, its checkpoint, and the text both are compared on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from toolkit.bundle.manifest import Manifest, read_manifest, verify_manifest
from toolkit.bundle.settings import read_settings
from toolkit.checkpoint.opened import Checkpoint
from toolkit.checkpoint.weights import Tensors, parameter_count
from toolkit.device.fitting import ON_NUMPY, Fitting
from toolkit.errors import BundleError
from toolkit.evaluate.session import is_here
from toolkit.machine import free_memory_bytes
from toolkit.pipeline.judge.effort import Effort
from toolkit.pipeline.judge.work import sample
from toolkit.pipeline.text import token_sequences
from toolkit.recipe import Recipe, data_folder
from toolkit.reference.greedy import Resident
from toolkit.target import TARGETS

# The prompt and the length of the greedy continuations through onnxruntime-genai.
GREEDY_PROMPT: Final = 24
_TEXT_FILE: Final = "reasoning.jsonl"
# The tokens that a passage of a thought needs to be one.
_SHORTEST: Final = 160


@dataclass(frozen=True)
class Subject:
    """The inputs of one validation, opened and found to belong together.

    `sequences` are the token ids that bundle and checkpoint are compared on, `task_files` the recipe's questions,
    `source` has the checkpoint's tensors, which stay in memory once read where tasks are asked and they fit. `here`
    says whether this machine has every execution provider of the bundle (else all runs on the CPU), `progress` takes a
    line for each step, and the reference runs on the device of `fitting`.
    """

    bundle: Path
    manifest: Manifest
    checkpoint: Checkpoint
    effort: Effort
    sequences: list[list[int]]
    task_files: tuple[Path, ...]
    source: Tensors
    here: bool
    progress: Callable[[str], None]
    fitting: Fitting

    @property
    def wants_baseline(self) -> bool:
        """Whether plain 4-bit rounding is measured beside."""
        wanted = self.manifest.recipe.baseline if self.effort.baseline is None else self.effort.baseline
        return bool(wanted) and not self.checkpoint.config.traced


def open_subject(
    bundle: Path, checkpoint: Checkpoint, effort: Effort, progress: Callable[[str], None], fitting: Fitting = ON_NUMPY
) -> Subject:
    """A bundle beside its checkpoint. Raises BundleError if it cannot be read or was not made from the checkpoint,
    CheckpointError for a text that holds none."""
    manifest = read_manifest(bundle)
    if problems := verify_manifest(bundle, lasting_alone=True):
        more = f" and {len(problems) - 1} more" if problems[1:] else ""
        raise BundleError(f"{bundle} is not as it was made: {problems[0]}{more}: `toolkit verify {bundle}` names all")
    _check_same(manifest, checkpoint)
    recipe = manifest.recipe
    task_files = tuple(task_file(name, recipe, checkpoint) for name in recipe.tasks)
    text = effort.text or (*task_files, data_folder("models") / _TEXT_FILE)[0]
    baseline = bool(recipe.baseline if effort.baseline is None else effort.baseline)
    form = TARGETS[recipe.target].in_profile(recipe.profile).in_precision(manifest.precision).form
    taken = sample(effort, checkpoint.config, form, baseline)
    effort = replace(effort, tokens=taken.tokens, examples=taken.examples)
    sequences = token_sequences(checkpoint, text, taken.tokens, _SHORTEST)
    here = is_here(read_settings(bundle))
    asks = bool(effort.own_tasks or (effort.tasks and task_files))
    copies = max(1, fitting.pool.here if fitting.pool else 1)
    source = Resident(checkpoint.source) if asks and _fits(checkpoint, copies) else checkpoint.source
    return Subject(bundle, manifest, checkpoint, effort, sequences, task_files, source, here, progress, fitting)


def _fits(checkpoint: Checkpoint, copies: int) -> bool:
    """Whether so many processes may each hold all weights to answer questions; the reference knows no traced model."""
    config = checkpoint.config
    return not config.traced and 8 * parameter_count(config) * copies < free_memory_bytes()


def _check_same(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Raises BundleError unless the checkpoint's files have the names and sizes that the manifest has. Their hashes are
    left alone: 30 GB of them would double the wait."""
    made_from = {entry.name: entry.bytes for entry in manifest.checkpoint}
    found = {entry.name: entry.bytes for entry in checkpoint.source.identity()}
    if made_from != found:
        raise BundleError(
            f"the bundle was made from {', '.join(made_from)}, the checkpoint in {checkpoint.folder} has "
            f"{', '.join(found)} or other sizes: name the right one with --checkpoint"
        )


def task_file(task: str, recipe: Recipe, checkpoint: Checkpoint) -> Path:
    """The file of a task's questions: the checkpoint's own, or the one beside the model's facts."""
    own = checkpoint.folder / f"{task}.jsonl"
    facts = recipe.facts()
    return facts / own.name if facts and not own.is_file() else own
