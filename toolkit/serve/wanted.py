"""What the playground asks of the shelf: a look at what there is, or a model to get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolkit.checkpoint.download import hub_file, is_hub_id
from toolkit.quality import QUALITIES
from toolkit.recipe import model_names
from toolkit.serve.refusal import Refusal
from toolkit.target import TARGETS
from toolkit.typed_json import Json, from_json

_LONGEST: Final = 200


@dataclass(frozen=True)
class Wanted:
    """A model to get: the name of one of the recipes, a hub id, or a GGUF file on the hub; None of `target` leaves it
    to the machine, None of `quality` to the recipe."""

    model: str
    target: str | None = None
    quality: str | None = None


@dataclass(frozen=True)
class Look:
    """What to list: the checkpoint of a hub id alone, or else every recipe and the bundles at and below `folders`."""

    folders: tuple[str, ...] = ()
    hub_id: str | None = None


@dataclass(frozen=True)
class ShelfJob:
    """A model to get, and the folder in which its bundle is made."""

    get: Wanted
    folder: str


def read_wanted(raw: Mapping[str, Json]) -> Wanted:
    """Reads a request to get a model. Raises Refusal for one that is neither in the catalogue nor on the hub: a folder
    of this machine is none of a page's business."""
    try:
        wanted = from_json(Wanted, raw, "the request")
    except ValueError as problem:
        raise Refusal(str(problem)) from None
    if wanted.model not in model_names():
        check_on_hub(wanted.model)
    if wanted.target is not None and wanted.target not in TARGETS:
        raise Refusal(f"no target {wanted.target!r:.40}: those known are {', '.join(TARGETS)}", param="target")
    if wanted.quality is not None and wanted.quality not in QUALITIES:
        raise Refusal(f"no quality {wanted.quality!r:.40}: expected {', '.join(QUALITIES)}", param="quality")
    return wanted


def check_on_hub(model: str) -> str:
    """Returns a hub id or a GGUF file on the hub as it is; raises Refusal for anything else."""
    is_of_hub = is_hub_id(model) or (hub_file(model) is not None and not Path(model).exists())
    if len(model) > _LONGEST or not is_of_hub:
        raise Refusal(
            f"{model!r:.80} is no model of the catalogue and no hub id: expected owner/name, or owner/name:file.gguf",
            param="model",
        )
    return model
