"""Foundry Local: a folder in its cache of models, and a program that registers it with an app's local catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from toolkit.files import json_text
from toolkit.hosts.inference_model import INFERENCE_MODEL_FILE, budget_notes, inference_model
from toolkit.hosts.installable import Installable
from toolkit.hosts.installation import Installation
from toolkit.hosts.words import FOUNDRY_LOCAL

METADATA_FILE: Final = "foundry_local.json"
REGISTER_FILE: Final = "register_in_foundry_local.py"
_PUBLISHER: Final = "toolkit"
# Runs wherever foundry-local-sdk is, which has no need of this toolkit.
_REGISTER: Final = '''\
"""Registers this folder's model with an app of Foundry Local: python register_in_foundry_local.py APP_NAME

It stays registered in that app's cache, and nothing is copied. An app calls `register` with its own local catalogue.
"""

import json
import sys
from pathlib import Path

from foundry_local_sdk import CatalogType, Configuration, FoundryLocalManager, ModelInfoBuilder

FOLDER = Path(__file__).resolve().parent


def register(catalog):
    """Registers the model with a local catalogue, in place of an older registration, and returns it."""
    known = json.loads((FOLDER / "foundry_local.json").read_text(encoding="utf-8"))
    if catalog.get_model_variant(known["model_id"]):
        catalog.unregister_model(known["model_id"])
    with ModelInfoBuilder() as metadata:
        for key, value in known["metadata"].items():
            set_property = metadata.set_int_property if isinstance(value, int) else metadata.set_string_property
            set_property(key, value)
        return catalog.register_model(str(FOLDER), known["model_id"], metadata)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    FoundryLocalManager.initialize(Configuration(app_name=sys.argv[1]))
    print("registered", register(FoundryLocalManager.instance.get_catalog(CatalogType.LOCAL)).id)
'''


def plan_foundry_local(bundle: Installable, name: str | None, root: Path | None) -> Installation:
    """Decides the folder `<cache>/toolkit/<name>`, which the cache's scanner reads, with the metadata of a registration
    beside: that tells the host the markers of a thought, which the scanner does not know."""
    named = f"{name}-{bundle.name.removeprefix(bundle.model + '-')}" if name else bundle.name
    folder = (root or Path.home() / ".foundry" / "cache" / "models") / _PUBLISHER / named
    texts = {
        INFERENCE_MODEL_FILE: inference_model(bundle, f"{named}:1"),
        METADATA_FILE: json_text({"model_id": f"{named}:1", "metadata": _metadata(bundle)}),
        REGISTER_FILE: _REGISTER,
    }
    return Installation(
        FOUNDRY_LOCAL,
        folder,
        {file: bundle.folder / file for file in bundle.files},
        texts,
        (f"python {folder / REGISTER_FILE} APP_NAME registers it with an app of foundry-local-sdk",),
        tuple([*budget_notes(bundle), *_notes(bundle)]),
    )


def _metadata(bundle: Installable) -> dict[str, str | int]:
    """The properties of a registration, by the names that the core reads: in camel case it reads none of them."""
    context: dict[str, str | int] = {"task": "chat-completion", "context_length": bundle.settings.context_length}
    if bundle.thinks is None:
        return context
    begin, end = bundle.thinks
    return {**context, "supports_reasoning": 1, "reasoning_start": begin, "reasoning_end": end}


def _notes(bundle: Installable) -> list[str]:
    row = bundle.target.accelerator
    found = []
    if row.provider:
        found.append(f"the app has to register {row.execution_provider} first: loading without may hang the host")
    if bundle.settings.is_pipeline and bundle.thinks is None:
        found.append("sessions give a second turn to the same generator, which several stages answer wrongly")
    return found
