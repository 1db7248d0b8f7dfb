"""AI Toolkit, Lemonade and Windows ML's catalogue, each as its sources say: none of them was run."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from toolkit.errors import UnsupportedError
from toolkit.files import json_text
from toolkit.hosts.inference_model import INFERENCE_MODEL_FILE, budget_notes, inference_model
from toolkit.hosts.installable import PROVIDER_NAMES, Installable
from toolkit.hosts.installation import Installation
from toolkit.hosts.words import AI_TOOLKIT, LEMONADE, WINDOWS_ML_CATALOG
from toolkit.recipe import known_license
from toolkit.report.readme import model_name

CATALOG_FILE: Final = "catalog.json"
LEMONADE_ENTRY_FILE: Final = "user_models.entry.json"
_PUBLISHER: Final = "toolkit"
# Lemonade's recipes of onnxruntime-genai by execution provider. The CPU's, oga-cpu, ended with 9.3 and had genai 0.9.2,
# which reads no bundle of ours.
_LEMONADE_RECIPES: Final = {"VitisAIExecutionProvider": "ryzenai-llm"}
# What Hugging Face calls a licence that it has no word for.
_OTHER_LICENSE: Final = "other"


def plan_ai_toolkit(bundle: Installable, name: str | None, root: Path | None) -> Installation:
    """Decides the folder of AI Toolkit, in exactly four layers: publisher, model, runtime, displayed name."""
    model, runtime = name or bundle.model, PROVIDER_NAMES[bundle.provider]
    folder = (root or Path.home() / ".aitk" / "models") / _PUBLISHER / model / runtime / f"{model}-{runtime}"
    return Installation(
        AI_TOOLKIT,
        folder,
        {file: bundle.folder / file for file in bundle.files},
        {INFERENCE_MODEL_FILE: inference_model(bundle, f"{model}-{runtime}")},
        ("reload the window of VS Code: models are read when the extension starts",),
        tuple(budget_notes(bundle)),
    )


def plan_lemonade(bundle: Installable, name: str | None, root: Path | None) -> Installation:
    """Decides a folder and the entry of user_models.json, which is Lemonade's own and therefore left to the user.

    Raises UnsupportedError for an execution provider that Lemonade has no recipe for.
    """
    recipe = _LEMONADE_RECIPES.get(bundle.provider)
    if recipe is None:
        raise UnsupportedError(
            f"Lemonade runs bundles for {', '.join(_LEMONADE_RECIPES)}, and this one is for {bundle.provider}"
        )
    named = f"{name or bundle.model}-{PROVIDER_NAMES[bundle.provider]}"
    cache = root or Path.home() / ".cache" / "lemonade"
    folder = cache / _PUBLISHER / named
    labels = ["custom", *(["reasoning"] if bundle.thinks else [])]
    place = {"checkpoint": str(folder.absolute()), "source": "local_path"}
    entry = {named: {**place, "recipe": recipe, "labels": labels}}
    return Installation(
        LEMONADE,
        folder,
        {file: bundle.folder / file for file in bundle.files},
        {LEMONADE_ENTRY_FILE: json_text(entry)},
        (f"add the entry of {folder / LEMONADE_ENTRY_FILE} to {cache / 'user_models.json'}, then restart Lemonade",),
        tuple(budget_notes(bundle)),
    )


def plan_windows_ml_catalog(
    bundle: Installable, name: str | None, root: Path | None, base_url: str | None, license: str | None
) -> Installation:
    """Decides a catalogue of one model, whose files are the bundle's own, or those at a URL where they are hosted."""
    named = f"{name or bundle.model}-{PROVIDER_NAMES[bundle.provider]}"
    folder = (root or Path("build") / WINDOWS_ML_CATALOG) / named
    known = license or known_license(bundle.manifest.recipe.name, bundle.manifest.recipe.target)
    digests = {entry.name: entry.sha256 for entry in bundle.manifest.files}
    files = [{"name": file, "uri": _uri(bundle, file, base_url), "sha256": digests[file]} for file in bundle.files]
    model = {
        "id": named,
        "name": name or bundle.model,
        "version": "1.0.0",
        "publisher": model_name(bundle.manifest).partition("/")[0],
        "executionProviders": [{"name": bundle.provider}],
        "modelSizeBytes": bundle.bytes(),
        "license": known or _OTHER_LICENSE,
        "files": files,
    }
    there = "" if base_url else "; its files are the bundle's, which has to stay where it is"
    return Installation(
        WINDOWS_ML_CATALOG,
        folder,
        {},
        {CATALOG_FILE: json_text({"models": [model]})},
        (f"ModelCatalogSource.CreateFromUriAsync opens {folder / CATALOG_FILE}{there}",),
        () if known else (f"the licence is said to be {_OTHER_LICENSE!r}: name the model's with --license",),
    )


def _uri(bundle: Installable, file: str, base_url: str | None) -> str:
    return f"{base_url.rstrip('/')}/{file}" if base_url else (bundle.folder.resolve() / file).as_uri()
