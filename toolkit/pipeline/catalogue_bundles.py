"""The bundles on this machine, each a row of the catalogue."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.bundle.manifest import read_manifest
from toolkit.bundle.settings import Settings, read_settings
from toolkit.errors import BundleError
from toolkit.pipeline.catalogue_row import BUNDLE, CatalogueRow, predicted_speed, runs_on
from toolkit.recipe import known_license
from toolkit.report.sections import Report
from toolkit.report.summary import load_report
from toolkit.report.weight_sections import Quantization
from toolkit.target import TARGETS

# Bundles lie in a folder of bundles: deeper there are other people's trees.
_DEPTH: Final = 2


def bundle_folders(places: Sequence[Path]) -> Iterator[Path]:
    """Yields the folders with a manifest of ours, at and below each place, sorted; none where a place is not there."""
    for place in places:
        for path, folders, files in os.walk(place):
            if names.MANIFEST_FILE in files and names.GENAI_CONFIG_FILE in files:
                yield Path(path)
                folders.clear()
            elif len(Path(path).relative_to(place).parts) >= _DEPTH:
                folders.clear()
            folders[:] = sorted(name for name in folders if not name.startswith(".") and not name.endswith(".partial"))


def bundle_row(bundle: Path) -> CatalogueRow | None:
    """Returns a bundle's row; None for one that cannot be read, of which `doctor` says why."""
    try:
        manifest, settings, report = read_manifest(bundle), read_settings(bundle), _report(bundle)
        cache = _cache_bytes(bundle, settings, report)
    except BundleError:
        return None
    target = TARGETS[manifest.recipe.target]
    size = sum(entry.bytes for entry in manifest.files)
    here, runs = runs_on(target, size, cache)
    weights = report.quantization if report else None
    tasks = report.tasks if report else None
    return CatalogueRow(
        BUNDLE,
        manifest.recipe.name,
        manifest.recipe.model,
        target.name,
        settings.context_length,
        size,
        weights.bits_per_weight if weights else 0.0,
        here,
        runs,
        predicted_speed(target, runs, _read_bytes(weights)),
        known_license(manifest.recipe.name, target.name),
        report.parity.mean_kld if report and report.parity else None,
        report.parity.top1_agreement if report and report.parity else None,
        tasks[0].accuracy if tasks else None,
        report.speed.decode_tokens_per_s if report and report.speed else None,
        str(bundle),
        names.TRACED if manifest.traced else None,
    )


def _report(bundle: Path) -> Report | None:
    try:
        return load_report(bundle)
    except BundleError:
        return None


def _cache_bytes(bundle: Path, settings: Settings, report: Report | None) -> int:
    """The bytes of the cache that a request takes which does not say how long it will be."""
    if report and (said := report.kv_cache):
        return said.bytes * settings.max_length // said.context_length
    # What reads a graph takes longer to import than all else here.
    from toolkit.bundle.cache import cache_bytes

    return cache_bytes(bundle, settings, settings.max_length)


def _read_bytes(weights: Quantization | None) -> int:
    """The bytes of weights that a token reads: all matrices but an embedding that is not the LM head too."""
    rows = weights.by_role if weights else ()
    untied = any(row.role == "lm_head" for row in rows)
    return sum(row.bytes for row in rows if not (untied and row.role == "embed_tokens"))
