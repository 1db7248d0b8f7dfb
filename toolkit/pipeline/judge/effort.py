"""How much of a bundle `validate` measures, as its options ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from toolkit.evaluate.tasks import Task


@dataclass(frozen=True)
class Effort:
    """How much is measured. `tokens` and `examples`, questions of each of the recipe's tasks, are by default as many as
    fit less than a minute of a typical machine, the same for a bundle everywhere (`pipeline/judge/work.py`).
    `baseline` None leaves it to the recipe, and `simulate` None to the transformer's size.

    `tasks` asks the recipe's own, beside `own_tasks`; an answer may have `max_new_tokens`. `simulated_examples` of each
    task are asked in the simulator too, and `simulated_tokens` compared there, 0 for two windows.
    """

    tokens: int | None = None
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
