"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from toolkit.device.words import CPU, DEVICES

ON_CPU: Final = click.option(
    "--on-cpu", is_flag=True, help="Run every stage on the CPU, whatever the bundle is made for."
)
BUNDLE: Final = click.argument("bundle", type=click.Path(path_type=Path))
AS_JSON: Final = click.option(
    "--json", "as_json", is_flag=True, help="One JSON document on stdout, the rest on stderr."
)
REVISION: Final = click.option("--revision", help="A branch, tag or commit of a hub id [main].")
ADAPTER: Final = click.option(
    "--adapter", type=click.Path(path_type=Path), help="A LoRA adapter's folder, merged into the checkpoint."
)


def _found_device(context: click.Context, option: click.Parameter, word: str) -> str:
    """The word itself, of a device that is here: said before anything is downloaded or computed."""
    from toolkit.device.chosen import chosen_device

    return chosen_device(word).name


DEVICE: Final = click.option(
    "--device",
    default=CPU,
    show_default=True,
    metavar="|".join(DEVICES),
    callback=_found_device,
    help="What the checkpoint's own arithmetic runs on; `torch` is torch on the CPU, `auto` a GPU if torch has one.",
)
WORKERS: Final = click.option(
    "--workers", metavar="ADDRESS|N", help="Pieces go to a Dask scheduler's workers, or to N processes here."
)
CHECKPOINT_HELP: Final = "A folder in Hugging Face layout, a GGUF file, or either on the hub [the recipe's model]."
