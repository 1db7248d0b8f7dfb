"""What must hold of a folder that `install` made, host by host: each line is one reason why a host would pass it over,
take it for another model, or fail to load it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import url2pathname

from toolkit import names
from toolkit.bundle.lint import lint_bundle
from toolkit.bundle.settings import read_settings
from toolkit.errors import BundleError
from toolkit.files import read_json
from toolkit.hosts.inference_model import INFERENCE_MODEL_FILE
from toolkit.hosts.installable import PROVIDER_NAMES
from toolkit.hosts.installation import MARK_FILE, read_mark
from toolkit.hosts.ort_package import tokenizer_digest
from toolkit.hosts.other_hosts import CATALOG_FILE, LEMONADE_ENTRY_FILE
from toolkit.hosts.words import AI_TOOLKIT, FOUNDRY_LOCAL, LEMONADE, PACKAGE, WINDOWS_ML_CATALOG
from toolkit.target import CPU_EP, TARGETS

_MOST_BYTES: Final = 16 << 20
# What Foundry Local leaves in a folder that is not whole yet, and passes over.
_UNFINISHED: Final = "download.tmp"


def lint_installed(folder: Path) -> list[str]:
    """Returns one line for each thing wrong with an installed folder. Raises BundleError for one that `install` did not
    make."""
    installed = read_mark(folder)
    if installed is None:
        raise BundleError(f"{folder} was not made by `toolkit install`: expected a folder with its {MARK_FILE}")
    if missing := [entry.name for entry in installed.files if not (folder / entry.name).is_file()]:
        return [f"{name} is missing: install the bundle again" for name in missing]
    try:
        return list(_RULES[installed.host](folder))
    except (BundleError, KeyError, TypeError, ValueError) as problem:
        return [f"a file of the host cannot be read, {problem}: install the bundle again"]


def _of_foundry_local(folder: Path) -> Iterator[str]:
    yield from lint_bundle(folder)
    word, name = _provider_word(folder), str(_json(folder / INFERENCE_MODEL_FILE)["Name"])
    if not re.fullmatch(r"[^:]+:\d+", name):
        yield f"{INFERENCE_MODEL_FILE} names {name!r}, expected a version behind a colon, which is 0 without"
    if not name.partition(":")[0].endswith(word):
        yield f"{INFERENCE_MODEL_FILE} names {name!r}, and the settings are for {word}: the host goes by the name"
    if (folder / _UNFINISHED).exists():
        yield f"{_UNFINISHED} is there, by which the host takes the folder for a download that has not ended"
    if above := next(
        (place for place in folder.resolve().parents if (place / names.GENAI_CONFIG_FILE).is_file()), None
    ):
        yield f"{above} is a model itself: the host looks no deeper"


def _of_ai_toolkit(folder: Path) -> Iterator[str]:
    yield from lint_bundle(folder)
    place, word, name = folder.resolve(), _provider_word(folder), str(_json(folder / INFERENCE_MODEL_FILE)["Name"])
    if place.parent.name != word or not place.name.endswith(word):
        yield f"{place.parent.name}/{place.name} should end with {word}, for which the settings are, both"
    if name != place.name:
        yield f"{INFERENCE_MODEL_FILE} names {name!r}, and the folder is called {place.name!r}"


def _of_lemonade(folder: Path) -> Iterator[str]:
    yield from lint_bundle(folder)
    for entry in _json(folder / LEMONADE_ENTRY_FILE).values():
        if Path(entry["checkpoint"]).resolve() != folder.resolve():
            yield f"{LEMONADE_ENTRY_FILE} leads to {entry['checkpoint']}, and the folder is elsewhere by now"


def _of_the_catalogue(folder: Path) -> Iterator[str]:
    for model in _json(folder / CATALOG_FILE)["models"]:
        for file in model["files"]:
            place = urlsplit(file["uri"])
            if place.scheme == "file" and not Path(url2pathname(place.path)).is_file():
                yield f"{file['name']} is no longer at {file['uri']}"


def _of_a_package(folder: Path) -> Iterator[str]:
    if (folder / names.GENAI_CONFIG_FILE).exists():
        yield f"{names.GENAI_CONFIG_FILE} is at the package's root, by which a host takes it for a plain model"
    variants = _json(folder / names.MANIFEST_FILE)["components"]["model"]["variants"]
    providers = [row["ep"] for row in variants.values()]
    for provider in sorted({one for one in providers if providers.count(one) > 1}):
        yield f"two variants are for {provider}: ONNX Runtime cannot choose"
    for name in variants:
        word = str(_json(folder / name / names.GENAI_CONFIG_FILE)["model"]["tokenizer_dir"])
        shared = folder / "shared_assets" / word.replace(":", "-")
        files = {path.name: path for path in shared.iterdir()} if shared.is_dir() else {}
        if word != f"sha256:{tokenizer_digest(files)}":
            yield f"{name}'s tokenizer {word} is not what lies in shared_assets"


_RULES: Final[Mapping[str, Callable[[Path], Iterator[str]]]] = {
    FOUNDRY_LOCAL: _of_foundry_local,
    AI_TOOLKIT: _of_ai_toolkit,
    LEMONADE: _of_lemonade,
    WINDOWS_ML_CATALOG: _of_the_catalogue,
    PACKAGE: _of_a_package,
}


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, _MOST_BYTES, BundleError, f"{path.parent} is not as it was installed")


def _provider_word(folder: Path) -> str:
    """What hosts call the execution provider of a folder's settings."""
    asked = read_settings(folder).providers()
    rows = [row.accelerator for row in TARGETS.values()]
    found = [row.execution_provider for row in rows if row.provider and row.provider.lower() in map(str.lower, asked)]
    return PROVIDER_NAMES[found[0] if found else CPU_EP]
