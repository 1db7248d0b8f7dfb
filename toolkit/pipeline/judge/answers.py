"""The tasks put to a bundle, to its checkpoint and to plain 4-bit rounding: the report's `tasks`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from toolkit.errors import RecipeError
from toolkit.evaluate.answers import Answers, Asked, ask, bundle_answers, compared, reference_answers
from toolkit.evaluate.rounded import plain_rounding
from toolkit.evaluate.tasks import read_task
from toolkit.pipeline.judge.effort import Effort
from toolkit.pipeline.judge.subject import Subject
from toolkit.pipeline.judge.traced import NO_REFERENCE
from toolkit.reference.greedy import Resident
from toolkit.report.sections import BaselineTaskRow, NotMeasured, TaskRow


def asked_tasks(subject: Subject) -> list[Asked]:
    """The tasks as the bundle is asked them: the recipe's and a user's own. Raises RecipeError for two of one name."""
    effort = subject.effort
    own = [read_task(path, effort.examples) for path in subject.task_files] if effort.tasks else []
    tasks = [*own, *effort.own_tasks]
    for k, task in enumerate(tasks):
        if any(task.name == other.name for other in tasks[:k]):
            raise RecipeError(f"two tasks are called {task.name!r}: rename the file of one, rows go by its name")
    return [ask(subject.bundle, task, effort.max_new_tokens, not subject.here) for task in tasks]


def questions_left_out(task_files: Sequence[Path], effort: Effort) -> list[NotMeasured]:
    """What of the recipe's tasks was not asked, where a sample of their questions was."""
    asked = effort.examples
    counts = [(path, len(read_task(path).questions)) for path in task_files] if effort.tasks else []
    said = [
        f"{path.stem}: the first {asked} of {count} questions (all: --examples {count})"
        for path, count in counts
        if asked is not None and asked < count
    ]
    return [NotMeasured("tasks.examples", "; ".join(said))] if said else []


class ReferenceAnswers:
    """The checkpoint's answers, each task asked once, and only where its weights fit into memory."""

    def __init__(self) -> None:
        self._made: dict[str, Answers] = {}

    def to(self, asked: Asked, subject: Subject) -> Answers | None:
        """Its answers to a task; None where it does not fit."""
        name = asked.task.name
        if isinstance(subject.source, Resident) and name not in self._made:
            subject.progress(f"task {name}: the reference")
            self._made[name] = reference_answers(subject.checkpoint.config, subject.source, asked, subject.fitting)
        return self._made.get(name)


def task_rows(subject: Subject, tasks: list[Asked], reference: ReferenceAnswers) -> tuple[TaskRow, ...]:
    """Returns a row a task: accuracy and length of the bundle's answers, and of the checkpoint's where it has any."""
    rows = []
    for asked in tasks:
        subject.progress(f"task {asked.task.name}: {len(asked.ids)} questions")
        ours = bundle_answers(subject.bundle, asked, not subject.here, subject.fitting.pool)
        rows.append(task_row(asked, ours, reference.to(asked, subject)))
    return tuple(rows)


def task_row(asked: Asked, ours: Answers, theirs: Answers | None) -> TaskRow:
    """One task's row: the bundle's answers, and the checkpoint's to the same questions."""
    row = TaskRow(
        **vars(ours.figures()), name=asked.task.name, examples=len(asked.ids), max_new_tokens=asked.new_tokens
    )
    if theirs is None:
        return row
    figures, pairs = theirs.figures(), compared(ours, theirs)
    return replace(
        row,
        reference_accuracy=figures.accuracy,
        reference_accuracy_se=figures.accuracy_se,
        reference_mean_answer_tokens=figures.mean_answer_tokens,
        reference_truncated=figures.truncated,
        right_to_wrong=pairs.right_to_wrong,
        wrong_to_right=pairs.wrong_to_right,
        accuracy_drop_se=pairs.accuracy_drop_se,
    )


def baseline_rows(subject: Subject, tasks: list[Asked], reference: ReferenceAnswers) -> tuple[BaselineTaskRow, ...]:
    """What plain 4-bit rounding of the checkpoint answers, each task that the checkpoint itself can be asked."""
    rounded, rows = Resident(plain_rounding(subject.source)), []
    for asked in tasks:
        if reference.to(asked, subject):
            subject.progress(f"task {asked.task.name}: plain 4-bit rounding")
            answers = reference_answers(subject.checkpoint.config, rounded, asked, subject.fitting)
            figures = answers.figures()
            rows.append(BaselineTaskRow(**vars(figures), name=asked.task.name, examples=len(asked.ids)))
    return tuple(rows)


def answers_not_measured(subject: Subject, rows: Sequence[TaskRow]) -> list[NotMeasured]:
    """Returns why there are no tasks in a report, or no answers of the checkpoint to them."""
    if any(row.reference_accuracy is None for row in rows):
        full = "the checkpoint as float32 does not fit into this machine's memory"
        reason = NO_REFERENCE if subject.checkpoint.config.traced else full
        return [NotMeasured("tasks.reference_accuracy", reason)]
    return [] if subject.effort.tasks else [NotMeasured("tasks", "left out by --no-tasks")]
