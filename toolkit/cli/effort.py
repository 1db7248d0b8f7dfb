"""How much `validate` measures: its options, which `export` has too, and what they ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from toolkit.pipeline.judge import Effort


def effort_options(command: Callable[..., None]) -> Callable[..., None]:
    """How much `validate` measures; `export` takes the same options."""
    for option in (
        click.option("--tokens", type=click.IntRange(min=2), help="Tokens compared [500 to 2000, as fit]."),
        click.option("--text", type=click.Path(path_type=Path), help="Text to compare on, or JSONL with `text`."),
        click.option(
            "--task",
            "own_tasks",
            type=click.Path(path_type=Path),
            multiple=True,
            metavar="FILE",
            help="Questions of your own beside the recipe's: JSONL of `question` or `prompt`, `answer`, `checker`.",
        ),
        click.option(
            "--examples", type=click.IntRange(min=1), help="Questions of each recipe's task [as fit, 20 or more]."
        ),
        click.option(
            "--max-new-tokens",
            type=click.IntRange(min=1),
            default=300,
            show_default=True,
            help="Tokens of an answer, its thought included; real distills need thousands.",
        ),
        click.option("--baseline/--no-baseline", default=None, help="Measure plain 4-bit rounding beside [recipe]."),
        click.option("--no-tasks", is_flag=True, help="Leave the recipe's questions out."),
        click.option("--simulate/--no-simulate", default=None, help="Run qnn's stages in QNN's simulator [if small]."),
        click.option(
            "--simulate-examples",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            metavar="N",
            help="Ask the first N questions of each task in the simulator too: seconds each, at least.",
        ),
        click.option(
            "--simulate-tokens",
            type=click.IntRange(min=2),
            metavar="N",
            help="Of the tokens compared, how many in the simulator too [two windows].",
        ),
        click.option("--no-speed", is_flag=True, help="Leave tokens per second out."),
    ):
        command = option(command)
    return command


def effort_of(options: dict[str, Any]) -> Effort:
    """What the options ask for. A user's own tasks are read here: before hours of work, rather than after."""
    from toolkit.evaluate.tasks import read_task
    from toolkit.pipeline.judge import Effort

    own_tasks = tuple(read_task(path, options["examples"]) for path in options["own_tasks"])
    return Effort(
        tokens=options["tokens"],
        examples=options["examples"],
        tasks=not options["no_tasks"],
        own_tasks=own_tasks,
        max_new_tokens=options["max_new_tokens"],
        speed=not options["no_speed"],
        baseline=options["baseline"],
        text=options["text"],
        simulate=options["simulate"],
        simulated_examples=options["simulate_examples"],
        simulated_tokens=options["simulate_tokens"] or 0,
    )
