"""The process that looks at the catalogue, and is kept for the next look: what it imports before its first takes half a
second of CPU."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from toolkit.errors import ToolkitError
from toolkit.pipeline.catalogue import Search, search_catalogue
from toolkit.pipeline.catalogue_row import BUNDLE, HUB, RECIPE, CatalogueRow
from toolkit.report.readme import place_name
from toolkit.serve.refusal import without_paths
from toolkit.serve.shelf_event import FAILED, ROWS, ShelfEvent, event_line
from toolkit.serve.wanted import Look
from toolkit.typed_json import from_json, to_json

# How long it waits for another look.
_KEPT_S: Final = 600
_LESS_URGENT: Final = 5


@dataclass(frozen=True)
class _Row:
    """A row of the catalogue and the word it is asked for by: a model to get, or a bundle's folder."""

    name: str
    facts: CatalogueRow


def _answered(look: Look) -> ShelfEvent:
    hub_ids = (look.hub_id,) if look.hub_id else ()
    try:
        rows = search_catalogue(Search(model=look.hub_id, folders=tuple(map(Path, look.folders)), hub_ids=hub_ids))
    except ToolkitError as problem:
        return ShelfEvent(FAILED, without_paths(" ".join(str(problem).split())))
    except Exception as problem:
        traceback.print_exc()
        return ShelfEvent(FAILED, f"a fault of the toolkit, {type(problem).__name__}: see what the server has printed")
    return ShelfEvent(ROWS, json.dumps({"rows": to_json([_shown(row) for row in rows])}))


def _shown(row: CatalogueRow) -> _Row:
    """A row without the places on this machine that it names."""
    names = {BUNDLE: Path(row.path or "").name, RECIPE: row.recipe.removesuffix(f"-{row.target}"), HUB: row.model}
    return _Row(names[row.kind], replace(row, path=None, model=place_name(row.model)))


def _read(looks: queue.Queue[Look]) -> None:
    for text in sys.stdin.buffer:
        looks.put(from_json(Look, json.loads(text), "a look"))
    # The server is gone.
    os._exit(0)


def main() -> None:
    """In the child: answers looks, a line each, until the server goes or asks no more."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if sys.platform != "win32":
        # Whoever opens the page may begin to talk at once.
        os.nice(_LESS_URGENT)
    looks: queue.Queue[Look] = queue.Queue()
    threading.Thread(target=_read, args=(looks,), daemon=True).start()
    with suppress(queue.Empty):
        while True:
            out.write(event_line(_answered(looks.get(timeout=_KEPT_S))))
            out.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
