"""`.ortpackage`: bundles of one model for several execution providers in one folder, as ONNX Runtime selects from.

Each variant is a folder with a genai_config.json of its own; the tokenizer stands once in a folder named by its hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from toolkit import names
from toolkit.bundle.compiled import compatibility_of
from toolkit.errors import RecipeError
from toolkit.files import file_sha256, json_text
from toolkit.hosts.installable import Installable
from toolkit.hosts.installation import Installation
from toolkit.hosts.words import PACKAGE

SUFFIX: Final = ".ortpackage"
_TOKENIZER_FILES: Final = (
    names.TOKENIZER_FILE,
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
)


def plan_package(bundles: Sequence[Installable], name: str | None, root: Path | None) -> Installation:
    """Decides the package of bundles of one model, a variant an execution provider. Raises RecipeError for two of one
    provider, which ONNX Runtime could not choose between, or bundles whose tokenizers differ."""
    providers = [bundle.provider for bundle in bundles]
    if twice := sorted({provider for provider in providers if providers.count(provider) > 1}):
        raise RecipeError(f"two bundles are for {twice[0]}: a package has one for each execution provider")
    shared = _tokenizer(bundles[0])
    for bundle in bundles[1:]:
        if tokenizer_digest(_tokenizer(bundle)) != tokenizer_digest(shared):
            raise RecipeError(f"{bundle.folder} and {bundles[0].folder} have other tokenizers: expected one model")
    digest = tokenizer_digest(shared)
    links = {f"shared_assets/sha256-{digest}/{file}": path for file, path in shared.items()}
    texts = {names.MANIFEST_FILE: json_text(_manifest(bundles, name or bundles[0].model))}
    for bundle in bundles:
        variant = bundle.manifest.recipe.target
        kept = [file for file in bundle.files if file not in shared and file != names.GENAI_CONFIG_FILE]
        links |= {f"{variant}/{file}": bundle.folder / file for file in kept}
        texts[f"{variant}/{names.GENAI_CONFIG_FILE}"] = _settings(bundle, digest)
    folder = (root or Path("build")) / f"{name or bundles[0].model}{SUFFIX}"
    chosen = ", ".join(dict.fromkeys(_provider_word(bundle) for bundle in bundles))
    return Installation(
        PACKAGE,
        folder,
        links,
        texts,
        (f"onnxruntime_genai.Config.from_package_ep({str(folder)!r}, EP) opens it, from 0.15.2 on; EP is {chosen}",),
    )


def _provider_word(bundle: Installable) -> str:
    """What `from_package_ep` calls it: genai's short name."""
    return bundle.target.accelerator.provider or "cpu"


def _manifest(bundles: Sequence[Installable], name: str) -> Mapping[str, object]:
    variants = {}
    for bundle in bundles:
        row: dict[str, str] = {"ep": bundle.provider, "device": bundle.target.accelerator.device}
        if compatible := compatibility_of(bundle.folder, bundle.settings):
            row["compatibility_string"] = compatible
        variants[bundle.manifest.recipe.target] = row
    return {
        "schema_version": "1.0",
        "package_name": name,
        "package_version": "1",
        "components": {"model": {"variants": variants}},
    }


def _settings(bundle: Installable, digest: str) -> str:
    """genai_config.json with the place of the tokenizer, which a package's reader knows and older ones refuse."""
    raw: dict[str, Any] = json.loads(bundle.settings.text)
    raw["model"]["tokenizer_dir"] = f"sha256:{digest}"
    return json_text(raw)


def _tokenizer(bundle: Installable) -> Mapping[str, Path]:
    return {file: bundle.folder / file for file in _TOKENIZER_FILES if file in bundle.files}


def tokenizer_digest(files: Mapping[str, Path]) -> str:
    """The hash that names a folder: of a line a file, its SHA-256, two spaces and its path, sorted."""
    lines = sorted(f"{file_sha256(path)}  {file}\n" for file, path in files.items())
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()
